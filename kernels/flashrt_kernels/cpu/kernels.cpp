// Compiled once per instruction set, with FLASHRT_ISA naming its namespace.

#include "attend_wide.h"
#include "axpys.h"
#include "blocks.h"
#include "channels.h"
#include "delta.h"
#include "dots.h"
#include "encode.h"
#include "labels.h"
#include "vectors.h"

#define STRING(x) #x
#define NAME(x) STRING(x)

namespace flashrt::FLASHRT_ISA {

// Touches every byte as cheaply as it can be done: the ceiling that the other kernels are measured against.
static uint64_t read(const void* data, size_t bytes) {
    const float* p = static_cast<const float*>(data);
    F most[8];
    for (F& m : most) m = zero();
    for (size_t i = 0; i + 128 <= bytes / 4; i += 128)
        for (int j = 0; j < 8; ++j) most[j] = max(most[j], load(p + i + 16 * j));
    float total = 0;
    for (const F& m : most) total += highest(m);
    uint32_t bits;
    std::memcpy(&bits, &total, 4);
    return bits;
}

extern const Kernels table_of_kernels;
const Kernels table_of_kernels = {
    NAME(FLASHRT_ISA), HALF_GEMM,    prepare, prepare_kept, dots,         axpys,        collect,  choose_channels, add_channels,
    activate,          to_half,      encode_kv,    pack_across,   pack_along,   pack_channels, tile,    attend_segment,        merge,
    encode_label,      encode_query, score_labels,  weigh_blocks, rms_norm,     layer_norm, rope,          convolve,
    l2_norm,          delta_step,   rms_norm_gated, sigmoid_gate, encode,
    decode_row,        decode_stored, finite,      read,
};

}  // namespace flashrt::FLASHRT_ISA
