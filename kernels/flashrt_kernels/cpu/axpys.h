// y += h * row: the down projection, neuron by neuron in ascending order.
#pragma once

#include "axpys_int4.h"

namespace flashrt::FLASHRT_ISA {

template <Codec codec, int T>
FLASHRT_INLINE void axpy_chunk(const uint8_t* const* rows, int count, int k, int chunk, const float* h, size_t h_step,
                               float* y, size_t y_step) {
    F acc[T][4];
    for (int t = 0; t < T; ++t)
        for (int j = 0; j < 4; ++j) acc[t][j] = load(y + t * y_step + CHUNK * chunk + 16 * j);
    for (int i = 0; i < count; ++i) {
        F w[4];
        decode<codec>(rows[i], k, chunk, w);
        for (int t = 0; t < T; ++t) {
            const F weight = splat(h[t * h_step + i]);
            for (int j = 0; j < 4; ++j) acc[t][j] = fma(weight, w[j], acc[t][j]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int j = 0; j < 4; ++j) store(y + t * y_step + CHUNK * chunk + 16 * j, acc[t][j]);
}

template <Codec codec>
void axpy_neurons(const uint8_t* const* rows, const uint8_t* const* next, int count, int k, const float* h,
                  size_t h_step, int tokens, float* y, size_t y_step) {
    const int kp = padded(k);
    const size_t chunk_bytes = row_bytes(codec, CHUNK) / CHUNK * CHUNK;  // of codes, a cache line at least
    for (int c = 0; c < kp / CHUNK; ++c) {
        for (int i = 0; i < count; ++i)
            for (size_t line = 0; line < chunk_bytes; line += 64) prefetch(next[i] + chunk_bytes * c + line);
        int t = 0;
#if defined(__AVX512F__)
        for (; t + 6 <= tokens && t + 8 != tokens; t += 6)
            axpy_chunk<codec, 6>(rows, count, k, c, h + t * h_step, h_step, y + t * y_step, y_step);
        for (; t + 4 <= tokens; t += 4)
            axpy_chunk<codec, 4>(rows, count, k, c, h + t * h_step, h_step, y + t * y_step, y_step);
#endif
        for (; t + 2 <= tokens; t += 2)
            axpy_chunk<codec, 2>(rows, count, k, c, h + t * h_step, h_step, y + t * y_step, y_step);
        for (; t < tokens; ++t)
            axpy_chunk<codec, 1>(rows, count, k, c, h + t * h_step, h_step, y + t * y_step, y_step);
    }
}

inline void axpys(Codec codec, const Bundles& b, size_t offset, int k, const float* h, size_t h_step, int tokens, float* y,
                  size_t y_step) {
    const uint8_t *rows[GATHER], *next[GATHER];
    for (int i = 0; i < GATHER; ++i) {  // some kernels take them all, and count what is missing as nothing
        rows[i] = b.at[i < b.count ? i : 0] + offset;
        next[i] = b.next[i < b.count ? i : 0] + offset;
    }
    if (codec == Codec::INT4) return axpys_int4(rows, next, b.count, k, h, h_step, tokens, y, y_step);
    with_own_codec(codec, [&](auto c) { axpy_neurons<c.value>(rows, next, b.count, k, h, h_step, tokens, y, y_step); });
}

inline void collect(Codec codec, int tokens, const float* sums, int k, float* y) {
    if (codec == Codec::INT4 && tokens == 1) return collect_int4(sums, k, y);
    for (int i = 0; i < k; ++i) y[i] += sums[i];
}

}  // namespace flashrt::FLASHRT_ISA
