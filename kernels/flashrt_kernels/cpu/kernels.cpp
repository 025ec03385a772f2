// Compiled once per instruction set, with FLASHRT_ISA naming its namespace.

#include "attend.h"
#include "axpys.h"
#include "dots.h"
#include "encode.h"
#include "vectors.h"

#define STRING(x) #x
#define NAME(x) STRING(x)

namespace flashrt::FLASHRT_ISA {

// Touches every byte as cheaply as it can be done: the ceiling that the other kernels are measured against.
static uint64_t read(const void* data, size_t bytes) {
    const char* p = static_cast<const char*>(data);
    uint64_t total[8] = {};
    for (size_t i = 0; i + 512 <= bytes; i += 512) {
        uint64_t words[64];
        prefetch(p + i + 4096);
        std::memcpy(words, p + i, sizeof words);
        for (int j = 0; j < 64; ++j) total[j % 8] ^= words[j];
    }
    return total[0] ^ total[1] ^ total[2] ^ total[3] ^ total[4] ^ total[5] ^ total[6] ^ total[7];
}

extern const Kernels table_of_kernels;
const Kernels table_of_kernels = {
    NAME(FLASHRT_ISA), HALF_GEMM, prepare, dots,     axpys,      activate, to_half,  pack_across, pack_along, tile,
    attend,            merge,     rms_norm, layer_norm, rope,    encode,   decode_row, read,
};

}  // namespace flashrt::FLASHRT_ISA
