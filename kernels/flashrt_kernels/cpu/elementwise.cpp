#include <cstring>

#include "ops.h"
#include "pool.h"

namespace flashrt {
namespace {

// Small jobs run on the calling thread: waking another costs more than they do.
template <typename F>
void rows_in_parallel(int64_t n, int64_t work_per_row, F&& row) {
    const int64_t grain = 1 + 65536 / (work_per_row + 1);
    parallel_for((n + grain - 1) / grain, [&](int64_t item, int) {
        for (int64_t i = item * grain; i < n && i < (item + 1) * grain; ++i) row(i);
    });
}

}  // namespace

void rms_norm(const float* x, size_t x_step, int64_t n, int k, const float* weight, float eps, float* out,
              size_t out_step) {
    rows_in_parallel(n, k, [&](int64_t i) { kernels().rms_norm(x + i * x_step, weight, k, eps, out + i * out_step); });
}

void layer_norm(const float* x, size_t x_step, int64_t n, int k, const float* weight, const float* bias, float eps,
                float* out, size_t out_step) {
    rows_in_parallel(n, k,
                     [&](int64_t i) { kernels().layer_norm(x + i * x_step, weight, bias, k, eps, out + i * out_step); });
}

void rms_norm_gated(const float* x, size_t x_step, const float* gate, size_t gate_step, int64_t n, int k,
                    const float* weight, float eps, float* out, size_t out_step) {
    rows_in_parallel(n, 4 * k, [&](int64_t i) {
        kernels().rms_norm_gated(x + i * x_step, gate + i * gate_step, weight, k, eps, out + i * out_step);
    });
}

void sigmoid_gate(float* x, size_t x_step, const float* gate, size_t gate_step, int64_t n, int k) {
    rows_in_parallel(n, 4 * k, [&](int64_t i) { kernels().sigmoid_gate(x + i * x_step, gate + i * gate_step, k); });
}

void activate(Activation activation, float* gate, size_t gate_step, const float* up, size_t up_step, int64_t n, int k) {
    rows_in_parallel(n, 4 * k,
                     [&](int64_t i) { kernels().activate(activation, gate + i * gate_step, up ? up + i * up_step : nullptr, k); });
}

void rope(float* x, size_t token_step, size_t head_step, int tokens, int heads, int dim, const float* cos,
          const float* sin) {
    const int half = dim / 2;
    rows_in_parallel(tokens, static_cast<int64_t>(heads) * dim, [&](int64_t t) {
        for (int h = 0; h < heads; ++h)
            kernels().rope(x + t * token_step + h * head_step, cos + t * half, sin + t * half, half);
    });
}

void kv_append(const float* k, size_t k_step, const float* v, size_t v_step, int tokens, int kv_heads, int dim,
               void* kv, KvCodecs codecs, int64_t context, int64_t start) {
    const size_t pair_bytes = kv_pair_bytes(codecs, dim), key_bytes = kv_row_bytes(codecs.key, dim);
    rows_in_parallel(tokens, static_cast<int64_t>(kv_heads) * dim, [&](int64_t t) {
        for (int h = 0; h < kv_heads; ++h) {
            char* pair = static_cast<char*>(kv) + (static_cast<size_t>(h) * context + start + t) * pair_bytes;
            kernels().encode_kv(codecs.key, k + t * k_step + h * dim, dim, pair);
            if (codecs.keys_only) continue;
            kernels().encode_kv(codecs.value, v + t * v_step + h * dim, dim, pair + key_bytes);
        }
    });
}

void dequantize(Codec codec, const uint8_t* rows, size_t stride, int64_t n, int k, float* out, size_t out_step) {
    rows_in_parallel(n, k, [&](int64_t i) { kernels().dequantize(codec, rows + i * stride, k, out + i * out_step); });
}

uint64_t read_all(const void* data, size_t bytes) {
    constexpr size_t PIECE = 1 << 20;
    const int64_t pieces = static_cast<int64_t>((bytes + PIECE - 1) / PIECE);
    uint64_t totals[64] = {};
    parallel_for(pieces, [&](int64_t i, int thread) {
        const size_t from = i * PIECE, size = bytes - from < PIECE ? bytes - from : PIECE;
        totals[thread % 64] ^= kernels().read(static_cast<const char*>(data) + from, size);
    });
    uint64_t total = 0;
    for (uint64_t t : totals) total ^= t;
    return total;
}

}  // namespace flashrt
