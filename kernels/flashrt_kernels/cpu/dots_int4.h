// int4 rows times the 8-bit activations of a few tokens, one span (256 weights) at a time.
//
// A span's codes are laid out so that lanes 2 j and 2 j + 1 of a sum hold nothing but group j: all its products are
// added as integers, exactly, before one conversion and the scales of row and token.
#pragma once

#include "activations.h"

namespace flashrt::FLASHRT_ISA {

// out[r][i * token_step] = the products of R rows with tokens `token` + i < T, from their sums of codes in units of the
// scales: less what the offsets take away, the sum over groups of b times the sum of x. Lane by lane, until all is there.
template <int R, int T>
FLASHRT_INLINE void finish(const uint8_t* const* rows, const Tokens& t, int token, F acc[T][R], float* const* out,
                           size_t token_step) {
    const int groups = t.kp / INT4_GROUP;
    const float* x_sums = t.sums + token * t.sum_step;
    for (int r = 0; r < R; ++r) {
        const Int4Row row(rows[r], t.kp);
        F offset[T];
        for (int i = 0; i < T; ++i) offset[i] = zero();
        for (int g = 0; g < groups; g += 16) {
            const F b = load_codes(row.b + g, groups - g);
            for (int i = 0; i < T; ++i) offset[i] = fma(b, load(x_sums + i * t.sum_step + g), offset[i]);
        }
        const F u = splat(row.u), v = splat(-row.v);
        for (int i = 0; i < T; ++i) acc[i][r] = fma(acc[i][r], u, mul(offset[i], v));
    }
    float sums[T * R];
    sum_each<T * R>(acc[0], sums);
    for (int i = 0; i < T; ++i)
        for (int r = 0; r < R; ++r) out[r][(token + i) * token_step] = sums[i * R + r];
}

template <int R>
struct Int4Span {  // 256 weights of each of R rows, taken apart once for all tokens
    B part[R][4];
    F scale[R];

    // `half` is 8 bytes times its number of groups: 64 but in the last span of a row.
    FLASHRT_INLINE Int4Span(const uint8_t* const* rows, int kp, int g, int half) {
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
    }

    // acc[r] += row r times x, whose codes and scales these are.
    FLASHRT_INLINE void add_to(F acc[R], const int8_t* x, const float* x_scale) const {
        const F both = load(x_scale);
        I sum[R];
        for (int r = 0; r < R; ++r) sum[r] = zero_i();
        for (int j = 0; j < 4; ++j) {
            const B xs = hold(load_bytes(x + 64 * j));
            for (int r = 0; r < R; ++r) sum[r] = dot(sum[r], part[r][j], xs);
        }
        for (int r = 0; r < R; ++r) acc[r] = fma(to_float(sum[r]), mul(scale[r], both), acc[r]);
    }
};

// The products of R rows with all tokens, ROOM at most; `out`: where each row's with the first token goes.
// One token's sums stay in registers; those of several are in the first-level cache, as a span's codes take the registers.
template <int R, int ROOM>
FLASHRT_INLINE void dot_int4(const uint8_t* const* rows, const uint8_t* const* next, const Tokens& t, float* const* out,
                             size_t token_step) {
    const int kp = t.kp, groups = kp / INT4_GROUP, count = ROOM == 1 ? 1 : t.count;
    const int8_t* q = reinterpret_cast<const int8_t*>(t.q);
    F acc[ROOM][R];
    for (int i = 0; i < count; ++i)
        for (int r = 0; r < R; ++r) acc[i][r] = zero();

    auto span = [&](int g, int half) FLASHRT_LAMBDA {
        for (int r = 0; r < R; ++r)
            for (int line = 0; line < 128; line += 64) prefetch(next[r] + 16 * g + line);
        const Int4Span<R> w(rows, kp, g, half);
        for (int i = 0; i < count; ++i)
            w.add_to(acc[i], q + i * 2 * t.q_step + INT4_GROUP * g, t.scales + i * t.scale_step + 2 * g);
    };
    int g = 0;
    for (; g + INT4_SPAN <= groups; g += INT4_SPAN) span(g, 64);
    if (g < groups) span(g, 8 * (groups - g));
    for (int r = 0; r < R; ++r)
        for (int line = 0; line < 2 * groups + 8; line += 64) prefetch(next[r] + kp / 2 + line);
    int i = 0;
    if constexpr (ROOM > 1)
        for (; i + 4 <= count; i += 4) finish<R, 4>(rows, t, i, acc + i, out, token_step);
    for (; i < count; ++i) finish<R, 1>(rows, t, i, acc + i, out, token_step);
}

}  // namespace flashrt::FLASHRT_ISA
