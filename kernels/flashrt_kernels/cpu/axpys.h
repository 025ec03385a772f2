// y += h * row: the down projection, neuron by neuron in ascending order, whatever the blocking.
#pragma once

#include "rows.h"

namespace flashrt::FLASHRT_ISA {

constexpr int NEURONS = 16;  // decoded between one load and one store of y

// Scales and offsets of NEURONS int4 rows as floats, for chunks [first, first + ROOM / 2).
struct Int4Scales {
    static constexpr int ROOM = 64;
    float scale[NEURONS][ROOM];
    float minus_offset[NEURONS][ROOM];

    FLASHRT_INLINE void fill(const uint8_t* rows, size_t stride, int count, int kp, int from, int to) {
        for (int i = 0; i < count; ++i) {
            const Int4Row r(rows + i * stride, kp);
            const F u = splat(r.u), v = splat(-r.v);
            for (int g = from; g < to; g += 16) {
                store(scale[i] + g - from, mul(load_codes(r.a + g, to - g), u));
                store(minus_offset[i] + g - from, mul(load_codes(r.b + g, to - g), v));
            }
        }
    }
};

template <Codec codec>
FLASHRT_INLINE void decode_scaled(const uint8_t* row, int kp, int chunk, const Int4Scales& s, int i, int g, F w[4]) {
    if constexpr (codec == Codec::INT4) {
        const Table low = table(s.scale[i][g], s.minus_offset[i][g]);
        const Table high = table(s.scale[i][g + 1], s.minus_offset[i][g + 1]);
        for (int j = 0; j < 2; ++j) look_up(row + 32 * chunk + 16 * j, low, high, w[j], w[j + 2]);
    } else {
        decode<codec>(row, kp, chunk, w);
    }
}

template <Codec codec, int T>
FLASHRT_INLINE void axpy_chunk(const uint8_t* rows, size_t stride, int count, int kp, int chunk, int lanes,
                               const Int4Scales& s, int g, const float* h, size_t h_step, float* const* y) {
    F acc[T][4];
    for (int t = 0; t < T; ++t)
        for (int j = 0; j < 4; ++j) {
            float* at = y[t] + CHUNK * chunk + 16 * j;
            acc[t][j] = lanes == CHUNK ? load(at) : load_part(at, lanes - 16 * j);
        }
    for (int i = 0; i < count; ++i) {
        F w[4];
        decode_scaled<codec>(rows + i * stride, kp, chunk, s, i, g, w);
        for (int t = 0; t < T; ++t) {
            const F weight = splat(h[t * h_step + i]);
            for (int j = 0; j < 4; ++j) acc[t][j] = fma(weight, w[j], acc[t][j]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int j = 0; j < 4; ++j) {
            float* at = y[t] + CHUNK * chunk + 16 * j;
            if (lanes == CHUNK) store(at, acc[t][j]);
            else store_part(at, acc[t][j], lanes - 16 * j);
        }
}

template <Codec codec>
void axpy_neurons(const uint8_t* rows, size_t stride, int count, int k, int first, int last, const float* h,
                  size_t h_step, int tokens, float* const* y) {
    const int kp = padded(k);
    const size_t chunk_bytes = row_bytes(codec, CHUNK) & ~size_t{31};  // of codes
    Int4Scales s;
    for (int c0 = first; c0 < last; c0 += Int4Scales::ROOM / 2) {
        const int c1 = c0 + Int4Scales::ROOM / 2 < last ? c0 + Int4Scales::ROOM / 2 : last;
        if constexpr (codec == Codec::INT4) s.fill(rows, stride, count, kp, 2 * c0, 2 * c1);
        for (int c = c0; c < c1; ++c) {
            // The same chunk of the next neurons: their rows are too short for the hardware to find a pattern in.
            const uint8_t* next = rows + NEURONS * stride + chunk_bytes * c;
            if (chunk_bytes >= 64 || !(c & 1))
                for (int i = 0; i < NEURONS; ++i)
                    for (size_t line = 0; line < chunk_bytes; line += 64) prefetch(next + i * stride + line);
            const int lanes = k - CHUNK * c < CHUNK ? k - CHUNK * c : CHUNK;
            const int g = 2 * (c - c0);
            int t = 0;
#if defined(__AVX512F__)
            for (; t + 6 <= tokens && t + 8 != tokens; t += 6)
                axpy_chunk<codec, 6>(rows, stride, count, kp, c, lanes, s, g, h + t * h_step, h_step, y + t);
            for (; t + 4 <= tokens; t += 4)
                axpy_chunk<codec, 4>(rows, stride, count, kp, c, lanes, s, g, h + t * h_step, h_step, y + t);
#endif
            for (; t + 2 <= tokens; t += 2)
                axpy_chunk<codec, 2>(rows, stride, count, kp, c, lanes, s, g, h + t * h_step, h_step, y + t);
            for (; t < tokens; ++t)
                axpy_chunk<codec, 1>(rows, stride, count, kp, c, lanes, s, g, h + t * h_step, h_step, y + t);
        }
    }
}

inline void axpys(Codec codec, const uint8_t* rows, size_t stride, int count, int k, int first, int last,
                  const float* h, size_t h_step, int tokens, float* const* y) {
    with_codec(codec, [&](auto c) {
        for (int i = 0; i < count; i += NEURONS)
            axpy_neurons<c.value>(rows + i * stride, stride, count - i < NEURONS ? count - i : NEURONS, k, first, last,
                                  h + i, h_step, tokens, y);
    });
}

}  // namespace flashrt::FLASHRT_ISA
