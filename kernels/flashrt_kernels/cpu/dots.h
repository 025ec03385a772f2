// Packed rows times the activations of a few tokens.
//
// Per (row, token) the order of operations is fixed; tokens and rows are grouped only to share decoding and loads.
#pragma once

#include "dots_int4.h"
#include "dots_kept.h"

namespace flashrt::FLASHRT_ISA {

// `out`: where each row's product with the first token goes.
template <int R, int T>
FLASHRT_INLINE void store_sums(const F acc[R][T], float* const* out, size_t token_step) {
    float sums[R * T];
    sum_each<R * T>(acc[0], sums);
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < T; ++i) out[r][i * token_step] = sums[r * T + i];
}

template <int R, int T>
FLASHRT_INLINE void dot_int8(const uint8_t* const* rows, const uint8_t* const* next, const Tokens& t, int token,
                             float* const* out, size_t token_step) {
    const int kp = t.kp, chunks = kp / CHUNK;
    const int16_t* q = t.q + static_cast<size_t>(token) * t.q_step;
    const float* scale = t.scales + token * t.scale_step;
    F acc[R][T];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < T; ++i) acc[r][i] = zero();

    for (int from = 0; from < chunks; from += 16) {
        const int count = chunks - from < 16 ? chunks - from : 16;
        float scales[R][T][16];
        for (int r = 0; r < R; ++r) {
            uint16_t halves[16] = {};
            std::memcpy(halves, rows[r] + kp + 2 * from, 2 * count);
            const F s = load_bf16(halves);
            for (int i = 0; i < T; ++i) store(scales[r][i], mul(s, load_part(scale + i * t.scale_step + from, count)));
        }
        for (int c = 0; c < count; ++c) {
            const int at = from + c;
            W w0[R], w1[R];
            for (int r = 0; r < R; ++r) {
                const uint8_t* codes = rows[r] + CHUNK * at;
                prefetch(next[r] + CHUNK * at);
                w0[r] = widen_i8(reinterpret_cast<const int8_t*>(codes));
                w1[r] = widen_i8(reinterpret_cast<const int8_t*>(codes) + 32);
            }
            for (int i = 0; i < T; ++i) {
                const W x0 = load_w(q + i * t.q_step + CHUNK * at);
                const W x1 = load_w(q + i * t.q_step + CHUNK * at + 32);
                for (int r = 0; r < R; ++r)
                    acc[r][i] =
                        fma(to_float(dot(dot(zero_i(), w0[r], x0), w1[r], x1)), splat(scales[r][i][c]), acc[r][i]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int line = 0; line < 2 * chunks; line += 64) prefetch(next[r] + kp + line);
    store_sums<R, T>(acc, out, token_step);
}

template <Codec codec, int T>
FLASHRT_INLINE void dot_float(const uint8_t* row, const uint8_t* next, const Tokens& t, int token, float* out,
                              size_t token_step) {
    constexpr int BYTES = codec == Codec::F32 ? 4 : 2;
    const float* x = t.f + token * t.f_step;
    F acc[T][4];
    for (int i = 0; i < T; ++i)
        for (int j = 0; j < 4; ++j) acc[i][j] = zero();
    for (int c = 0; c < t.kp / CHUNK; ++c) {
        for (int line = 0; line < BYTES; ++line) prefetch(next + CHUNK * (BYTES * c + line));
        F w[4];
        decode<codec>(row, t.k, c, w);
        for (int i = 0; i < T; ++i)
            for (int j = 0; j < 4; ++j)
                acc[i][j] = fma(w[j], load(x + i * t.f_step + CHUNK * c + 16 * j), acc[i][j]);
    }
    for (int i = 0; i < T; ++i) out[i * token_step] = sum(add(add(acc[i][0], acc[i][1]), add(acc[i][2], acc[i][3])));
}

template <Codec codec, int R, int T>
FLASHRT_INLINE void dot(const uint8_t* const* rows, const uint8_t* const* next, const Tokens& t, int token,
                        float* const* out, size_t token_step) {
    float* to[R];
    for (int r = 0; r < R; ++r) to[r] = out[r] + token * token_step;
    if constexpr (codec == Codec::INT8) {
        dot_int8<R, T>(rows, next, t, token, to, token_step);
    } else {
        for (int r = 0; r < R; ++r) dot_float<codec, T>(rows[r], next[r], t, token, to[r], token_step);
    }
}

template <Codec codec, int R>
FLASHRT_INLINE void dot_tokens(const uint8_t* const* rows, const uint8_t* const* next, const Tokens& t,
                               float* const* out, size_t token_step) {
    int i = 0;
#if defined(__AVX512F__)
    if constexpr (codec == Codec::INT8)  // one sum per token and row: there is room for eight
        for (; i + 8 <= t.count; i += 8) dot<codec, R, 8>(rows, next, t, i, out, token_step);
    for (; i + 4 <= t.count; i += 4) dot<codec, R, 4>(rows, next, t, i, out, token_step);
#endif
    for (; i + 2 <= t.count; i += 2) dot<codec, R, 2>(rows, next, t, i, out, token_step);
    for (; i < t.count; ++i) dot<codec, R, 1>(rows, next, t, i, out, token_step);
}

// The products of R rows with all tokens.
template <Codec codec, int R>
FLASHRT_INLINE void dot_rows(const uint8_t* const* rows, const uint8_t* const* next, const Tokens& t,
                             float* const* out, size_t token_step) {
    if constexpr (is_kept(codec)) dot_kept_rows<FormatOf<codec>, R>(rows, next, t, out, token_step);
    else if constexpr (codec != Codec::INT4) dot_tokens<codec, R>(rows, next, t, out, token_step);
    else if (t.count == 1) dot_int4<R, 1>(rows, next, t, out, token_step);
    else dot_int4<R, NARROW_TOKENS>(rows, next, t, out, token_step);
}

// Rows share the loads of the activations.
template <Codec codec>
void dot_bundles(const Bundles& b, const Tokens& t, const DotOut& out) {
    constexpr int R = codec == Codec::INT4 ? 4 : 2;
    const size_t bytes = row_bytes(codec, t.k);
    const int total = b.count * b.rows;
    const uint8_t *rows[R], *next[R];
    float* to[R];
    int bundle = 0, row = 0;
    auto gather = [&](int n) {
        for (int i = 0; i < n; ++i) {
            rows[i] = b.at[bundle] + row * bytes;
            next[i] = b.next[bundle] + row * bytes;
            to[i] = out.data + bundle * out.bundle_step + row * out.row_step;
            if (++row == b.rows) row = 0, ++bundle;
        }
    };
    int at = 0;
    for (; at + R <= total; at += R) {
        gather(R);
        dot_rows<codec, R>(rows, next, t, to, out.token_step);
    }
    for (; at < total; ++at) {
        gather(1);
        dot_rows<codec, 1>(rows, next, t, to, out.token_step);
    }
}

inline void dots(Codec codec, const Bundles& bundles, const Tokens& t, const DotOut& out) {
    with_codec(codec, [&](auto c) { dot_bundles<c.value>(bundles, t, out); });
}

}  // namespace flashrt::FLASHRT_ISA
