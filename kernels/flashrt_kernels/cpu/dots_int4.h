// int4 rows times the 8-bit activations of a few tokens, one span (256 weights) at a time.
//
// A span's codes are laid out so that lanes 2 j and 2 j + 1 of a sum hold nothing but group j: all its products are
// added as integers, exactly, before one conversion and the scales of row and token.
#pragma once

#include "activations.h"

namespace flashrt::FLASHRT_ISA {

// The scale codes' common factor times acc, minus what the offsets take away: their sum over groups of b times the sum
// of x. Still lane by lane.
template <int T>
FLASHRT_INLINE void take_offsets(const Int4Row& row, const Tokens& t, int token, F acc[T]) {
    const int groups = t.kp / INT4_GROUP;
    const float* sums = t.sums + token * t.groups;
    F offset[T];
    for (int i = 0; i < T; ++i) offset[i] = zero();
    for (int g = 0; g < groups; g += 16) {
        const F b = load_codes(row.b + g, groups - g);
        for (int i = 0; i < T; ++i) offset[i] = fma(b, load(sums + i * t.groups + g), offset[i]);
    }
    const F u = splat(row.u), v = splat(-row.v);
    for (int i = 0; i < T; ++i) acc[i] = fma(acc[i], u, mul(offset[i], v));
}

// `out`: where each row's product with the first token goes.
template <int R, int T>
FLASHRT_INLINE void store_sums(const F acc[R][T], float* const* out, size_t token_step) {
    float sums[R * T];
    sum_each<R * T>(acc[0], sums);
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < T; ++i) out[r][i * token_step] = sums[r * T + i];
}

// The span that begins with group g: `half` is 8 bytes times its number of groups, 64 but in the last one.
template <int R, int T>
FLASHRT_INLINE void dot_span(const uint8_t* const* rows, int kp, int g, int half, const int8_t* q, size_t q_step,
                             const float* x_scale, size_t scale_step, F acc[R][T]) {
    B part[R][4];
    F scale[R];
    for (int r = 0; r < R; ++r) {
        const uint8_t* at = rows[r] + 16 * g;
        const B first = half == 64 ? load_bytes(at) : load_bytes(at, half);
        const B second = half == 64 ? load_bytes(at + 64) : load_bytes(at + half, half);
        part[r][0] = low_nibbles(first);
        part[r][1] = high_nibbles(first);
        part[r][2] = low_nibbles(second);
        part[r][3] = high_nibbles(second);
        scale[r] = load_doubled_u8(rows[r] + kp / 2 + g);
    }
    for (int i = 0; i < T; ++i) {
        const int8_t* x = q + i * q_step;
        const F both = load(x_scale + i * scale_step);
        I sum[R];
        for (int r = 0; r < R; ++r) sum[r] = zero_i();
        for (int j = 0; j < 4; ++j) {
            const B xs = hold(load_bytes(x + 64 * j));
            for (int r = 0; r < R; ++r) sum[r] = dot(sum[r], part[r][j], xs);
        }
        for (int r = 0; r < R; ++r) acc[r][i] = fma(to_float(sum[r]), mul(scale[r], both), acc[r][i]);
    }
}

template <int R, int T>
FLASHRT_INLINE void dot_int4(const uint8_t* const* rows, const uint8_t* const* next, const Tokens& t, int token,
                             float* const* out, size_t token_step) {
    const int kp = t.kp, groups = kp / INT4_GROUP;
    const size_t q_step = 2 * t.q_step;
    const int8_t* q = reinterpret_cast<const int8_t*>(t.q) + token * q_step;
    const float* x_scale = t.scales + token * t.scale_step;
    F acc[R][T];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < T; ++i) acc[r][i] = zero();

    auto span = [&](int g, int half) FLASHRT_LAMBDA {
        for (int r = 0; r < R; ++r)
            for (int line = 0; line < 128; line += 64) prefetch(next[r] + 16 * g + line);
        dot_span<R, T>(rows, kp, g, half, q + INT4_GROUP * g, q_step, x_scale + 2 * g, t.scale_step, acc);
    };
    int g = 0;
    for (; g + INT4_SPAN <= groups; g += INT4_SPAN) span(g, 64);
    if (g < groups) span(g, 8 * (groups - g));
    for (int r = 0; r < R; ++r) {
        const Int4Row row(rows[r], kp);
        for (int line = 0; line < 2 * groups + 8; line += 64) prefetch(next[r] + kp / 2 + line);
        take_offsets<T>(row, t, token, acc[r]);
    }
    store_sums<R, T>(acc, out, token_step);
}

}  // namespace flashrt::FLASHRT_ISA
