// Packed rows times the activations of a few tokens.
//
// Per (row, token) the order of operations is fixed; tokens and rows are grouped only to share decoding and loads.
#pragma once

#include "rows.h"

namespace flashrt::FLASHRT_ISA {

// Rounds one token's activations to 16 bits per chunk of 64, or copies them, padded, for float codecs.
inline void prepare(Codec codec, const float* x, int token, Tokens& t) {
    float* f = t.f + static_cast<size_t>(token) * t.kp;
    std::memcpy(f, x, 4 * static_cast<size_t>(t.k));
    std::memset(f + t.k, 0, 4 * static_cast<size_t>(t.kp - t.k));
    if (codec == Codec::F32 || codec == Codec::BF16) return;

    int16_t* q = t.q + static_cast<size_t>(token) * t.kp;
    float* scale = t.scale + token * t.groups;
    float* sums = t.sums + token * t.groups;
    std::memset(scale, 0, 4 * t.groups);
    std::memset(sums, 0, 4 * t.groups);
    for (int c = 0; c < t.kp / CHUNK; ++c) {
        F v[4], most = zero(), poison = zero();
        for (int j = 0; j < 4; ++j) {
            v[j] = load(f + CHUNK * c + 16 * j);
            most = max(most, abs(v[j]));
            poison = fma(v[j], zero(), poison);  // NaN if x is not finite, and then so is the result
        }
        const float top = highest(most);
        const float s = top > 1e-30f ? top / 32767.0f : 0.0f;
        const F inverse = splat(top > 1e-30f ? 32767.0f / top : 0.0f);
        F r[4];
        for (int j = 0; j < 4; ++j) {
            r[j] = round(mul(v[j], inverse));
            store_i16(q + CHUNK * c + 16 * j, r[j]);
        }
        scale[c] = s + sum(poison);
        sums[2 * c] = sum(add(r[0], r[1])) * s;  // sums of integers below 2^24: exact
        sums[2 * c + 1] = sum(add(r[2], r[3])) * s;
    }
}

FLASHRT_INLINE void load_pairs(int32_t* pairs, const uint8_t* codes, int n) {
    if (n >= 16) return store_duplicated_u8(pairs, codes);
    uint8_t tail[16] = {};
    for (int i = 0; i < n; ++i) tail[i] = codes[i];
    store_duplicated_u8(pairs, tail);
}

// v * b summed over the groups of a row, times the sums of x over them: what the offsets take away.
template <int T>
FLASHRT_INLINE void dot_offsets(const Int4Row& row, const Tokens& t, int token, float* out) {
    const int groups = t.kp / INT4_GROUP;
    const float* sums = t.sums + token * t.groups;
    F acc[T];
    for (int i = 0; i < T; ++i) acc[i] = zero();
    for (int g = 0; g < groups; g += 16) {
        const F b = load_codes(row.b + g, groups - g);
        for (int i = 0; i < T; ++i) acc[i] = fma(b, load(sums + i * t.groups + g), acc[i]);
    }
    for (int i = 0; i < T; ++i) out[i] = row.v * sum(acc[i]);
}

template <int R, int T>
FLASHRT_INLINE void dot_int4(const uint8_t* rows, size_t stride, const Tokens& t, int token, float* out,
                             size_t row_step, size_t token_step, size_t ahead) {
    const int kp = t.kp, groups = kp / INT4_GROUP;
    const int16_t* q = t.q + static_cast<size_t>(token) * kp;
    const float* scale = t.scale + token * t.groups;
    F acc[R][T];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < T; ++i) acc[r][i] = zero();

    for (int g = 0; g < groups; g += 16) {  // eight chunks
        const int left = groups - g;
        int32_t pairs[R][16];
        for (int r = 0; r < R; ++r) {
            const uint8_t* row = rows + r * stride;
            for (int line = 0; line < 256; line += 64) prefetch(row + ahead + 16 * g + line);
            load_pairs(pairs[r], row + kp / 2 + g, left);
        }
        const int chunks = left < 16 ? left / 2 : 8;
        for (int c = 0; c < chunks; ++c) {
            const int at = g / 2 + c;
            W low[R], high[R];
            for (int r = 0; r < R; ++r) {
                const W both = widen_u8(rows + r * stride + 32 * at);
                low[r] = mul_pair(low_nibble(both), &pairs[r][2 * c]);
                high[r] = mul_pair(high_nibble(both), &pairs[r][2 * c + 1]);
            }
            for (int i = 0; i < T; ++i) {
                const W x0 = load_w(q + static_cast<size_t>(i) * kp + CHUNK * at);
                const W x1 = load_w(q + static_cast<size_t>(i) * kp + CHUNK * at + 32);
                const F s = splat(scale[i * t.groups + at]);
                for (int r = 0; r < R; ++r)
                    acc[r][i] = fma(to_float(dot(dot(zero_i(), low[r], x0), high[r], x1)), s, acc[r][i]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        const Int4Row row(rows + r * stride, kp);
        for (int line = 0; line < 2 * groups + 8; line += 64) prefetch(row.a + ahead + line);
        float offsets[T];
        dot_offsets<T>(row, t, token, offsets);
        for (int i = 0; i < T; ++i) out[r * row_step + i * token_step] = row.u * sum(acc[r][i]) - offsets[i];
    }
}

template <int R, int T>
FLASHRT_INLINE void dot_int8(const uint8_t* rows, size_t stride, const Tokens& t, int token, float* out,
                             size_t row_step, size_t token_step, size_t ahead) {
    const int kp = t.kp, chunks = kp / CHUNK;
    const int16_t* q = t.q + static_cast<size_t>(token) * kp;
    const float* scale = t.scale + token * t.groups;
    F acc[R][T];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < T; ++i) acc[r][i] = zero();

    for (int from = 0; from < chunks; from += 16) {
        const int count = chunks - from < 16 ? chunks - from : 16;
        float scales[R][T][16];
        for (int r = 0; r < R; ++r) {
            uint16_t halves[16] = {};
            std::memcpy(halves, rows + r * stride + kp + 2 * from, 2 * count);
            const F s = load_bf16(halves);
            for (int i = 0; i < T; ++i) store(scales[r][i], mul(s, load_part(scale + i * t.groups + from, count)));
        }
        for (int c = 0; c < count; ++c) {
            const int at = from + c;
            W w0[R], w1[R];
            for (int r = 0; r < R; ++r) {
                const uint8_t* codes = rows + r * stride + CHUNK * at;
                prefetch(codes + ahead);
                w0[r] = widen_i8(reinterpret_cast<const int8_t*>(codes));
                w1[r] = widen_i8(reinterpret_cast<const int8_t*>(codes) + 32);
            }
            for (int i = 0; i < T; ++i) {
                const W x0 = load_w(q + static_cast<size_t>(i) * kp + CHUNK * at);
                const W x1 = load_w(q + static_cast<size_t>(i) * kp + CHUNK * at + 32);
                for (int r = 0; r < R; ++r)
                    acc[r][i] =
                        fma(to_float(dot(dot(zero_i(), w0[r], x0), w1[r], x1)), splat(scales[r][i][c]), acc[r][i]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        prefetch(rows + r * stride + kp + ahead);
        for (int i = 0; i < T; ++i) out[r * row_step + i * token_step] = sum(acc[r][i]);
    }
}

template <Codec codec, int T>
FLASHRT_INLINE void dot_float(const uint8_t* row, const Tokens& t, int token, float* out, size_t token_step,
                              size_t ahead) {
    constexpr int BYTES = codec == Codec::F32 ? 4 : 2;
    const float* x = t.f + static_cast<size_t>(token) * t.kp;
    F acc[T][4];
    for (int i = 0; i < T; ++i)
        for (int j = 0; j < 4; ++j) acc[i][j] = zero();
    for (int c = 0; c < t.kp / CHUNK; ++c) {
        for (int line = 0; line < BYTES; ++line) prefetch(row + ahead + CHUNK * (BYTES * c + line));
        F w[4];
        decode<codec>(row, t.kp, c, w);
        for (int i = 0; i < T; ++i)
            for (int j = 0; j < 4; ++j)
                acc[i][j] = fma(w[j], load(x + static_cast<size_t>(i) * t.kp + CHUNK * c + 16 * j), acc[i][j]);
    }
    for (int i = 0; i < T; ++i) out[i * token_step] = sum(add(add(acc[i][0], acc[i][1]), add(acc[i][2], acc[i][3])));
}

template <Codec codec, int R, int T>
FLASHRT_INLINE void dot(const uint8_t* rows, size_t stride, const Tokens& t, int token, float* out, size_t row_step,
                        size_t token_step, size_t ahead) {
    if constexpr (codec == Codec::INT4) {
        dot_int4<R, T>(rows, stride, t, token, out, row_step, token_step, ahead);
    } else if constexpr (codec == Codec::INT8) {
        dot_int8<R, T>(rows, stride, t, token, out, row_step, token_step, ahead);
    } else {
        for (int r = 0; r < R; ++r)
            dot_float<codec, T>(rows + r * stride, t, token, out + r * row_step, token_step, ahead);
    }
}

template <Codec codec, int R>
void dot_tokens(const uint8_t* rows, size_t stride, const Tokens& t, float* out, size_t row_step, size_t token_step,
                size_t ahead) {
    int i = 0;
#if defined(__AVX512F__)
    if constexpr (codec == Codec::INT4 || codec == Codec::INT8)  // one sum per token and row: there is room for eight
        for (; i + 8 <= t.count; i += 8)
            dot<codec, R, 8>(rows, stride, t, i, out + i * token_step, row_step, token_step, ahead);
    for (; i + 4 <= t.count; i += 4)
        dot<codec, R, 4>(rows, stride, t, i, out + i * token_step, row_step, token_step, ahead);
#endif
    for (; i + 2 <= t.count; i += 2)
        dot<codec, R, 2>(rows, stride, t, i, out + i * token_step, row_step, token_step, ahead);
    for (; i < t.count; ++i) dot<codec, R, 1>(rows, stride, t, i, out + i * token_step, row_step, token_step, ahead);
}

inline void dots(Codec codec, const uint8_t* rows, size_t stride, int count, const Tokens& t, float* out,
                 size_t row_step, size_t token_step, size_t ahead) {
    with_codec(codec, [&](auto c) {
        int r = 0;
        for (; r + 2 <= count; r += 2)
            dot_tokens<c.value, 2>(rows + r * stride, stride, t, out + r * row_step, row_step, token_step, ahead);
        if (r < count)
            dot_tokens<c.value, 1>(rows + r * stride, stride, t, out + r * row_step, row_step, token_step, ahead);
    });
}

}  // namespace flashrt::FLASHRT_ISA
