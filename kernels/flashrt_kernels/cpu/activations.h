// Activations of a few tokens, rounded for the codec whose rows they will meet.
#pragma once

#include "rows.h"

namespace flashrt::FLASHRT_ISA {

// 16 N numbers of one token, and the integers nearest to them in steps of `scale`.
template <int N>
struct Rounded {
    F codes[N];
    float scale;

    FLASHRT_INLINE Rounded(const float* x, float levels) {
        F v[N], most = zero(), poison = zero();
        for (int j = 0; j < N; ++j) {
            v[j] = load(x + 16 * j);
            most = max(most, abs(v[j]));
            poison = fma(v[j], zero(), poison);  // NaN if x is not finite, and then so is the result
        }
        const float top = highest(most);
        const F inverse = splat(top > 1e-30f ? levels / top : 0.0f);
        for (int j = 0; j < N; ++j) codes[j] = round(mul(v[j], inverse));
        scale = (top > 1e-30f ? top / levels : 0.0f) + sum(poison);
    }
};

// 16 bits per chunk for int8 rows: as good as exact.
inline void prepare_int8(const float* x, int16_t* q, float* scales, int kp) {
    for (int c = 0; c < kp / CHUNK; ++c) {
        const Rounded<4> chunk(x + CHUNK * c, 32767.0f);
        for (int j = 0; j < 4; ++j) store_i16(q + CHUNK * c + 16 * j, chunk.codes[j]);
        scales[c] = chunk.scale;
    }
}

// 8 bits per group for int4 rows, whose own error is twenty times larger. In the order in which a span's codes are
// unpacked: weights 0-7 of its groups, then 8-15, 16-23 and 24-31; a group's scale is there for both its lanes.
inline void prepare_int4(const float* x, int8_t* q, float* scales, float* sums, int kp) {
    for (int g = 0; g < kp / INT4_GROUP; ++g) {
        const Rounded<2> group(x + INT4_GROUP * g, 127.0f);
        int8_t codes[INT4_GROUP];
        for (int j = 0; j < 2; ++j) store_i8(codes + 16 * j, group.codes[j]);
        int8_t* to = q + SPAN_WEIGHTS * (g / INT4_SPAN) + 8 * (g % INT4_SPAN);
        for (int part = 0; part < 4; ++part) std::memcpy(to + 8 * INT4_SPAN * part, codes + 8 * part, 8);
        scales[2 * g] = scales[2 * g + 1] = group.scale;
        sums[g] = sum(add(group.codes[0], group.codes[1])) * group.scale;
    }
}

// For kept rows: codes 256 c + f of a group of 32, c and f signed bytes, in their order: all c of a token, then all f.
// Without `fine` f counts for nothing. Beside them the sums of four codes each, as integers, where other rows have f,
// and the sum of x over each group: of 256, eight zeros and then the eight sums.
inline void prepare_kept(const float* x, int from, int n, int token, Tokens& t) {
    int8_t* coarse = reinterpret_cast<int8_t*>(t.q + token * t.q_step) + from;
    int8_t* fine = coarse + t.q_step;
    int32_t* lanes = reinterpret_cast<int32_t*>(t.f + token * t.f_step) + from / 4;
    float* scales = t.scales + token * t.scale_step + from / 32;
    float* sums = t.sums + token * t.sum_step;
    for (int g = 0; g < n / 32; ++g, coarse += 32, fine += 32, lanes += 8) {
        const Rounded<2> group(x + 32 * g, 32512.0f);
        for (int j = 0; j < 2; ++j) {
            const F c = round(mul(group.codes[j], splat(1.0f / 256.0f)));
            const F f = max(splat(-127.0f), sub(group.codes[j], mul(c, splat(256.0f))));
            store_i8(coarse + 16 * j, c);
            store_i8(fine + 16 * j, f);
        }
        int32_t total = 0;
        for (int i = 0; i < 8; ++i) {
            int32_t sum = 0;
            for (int j = 4 * i; j < 4 * i + 4; ++j) sum += t.fine ? 256 * coarse[j] + fine[j] : coarse[j];
            total += lanes[i] = sum;
        }
        const int at = from / 32 + g;
        scales[g] = t.fine ? group.scale : 256.0f * group.scale;
        sums[at / 8 * 16 + at % 8] = 0.0f;
        sums[at / 8 * 16 + 8 + at % 8] = static_cast<float>(total) * scales[g];
    }
}

// Rounds one token's activations, or copies them, padded, for float codecs.
inline void prepare(Codec codec, const float* x, int token, Tokens& t) {
    if (is_kept(codec)) {
        constexpr float NONE[32] = {};
        prepare_kept(x, 0, t.k, token, t);
        if (t.k < t.kp) prepare_kept(NONE, t.k, t.kp - t.k, token, t);
        return;
    }
    float* f = t.f + token * t.f_step;
    std::memcpy(f, x, 4 * static_cast<size_t>(t.k));
    std::memset(f + t.k, 0, 4 * static_cast<size_t>(t.kp - t.k));
    if (codec == Codec::F32 || codec == Codec::BF16) return;

    int16_t* q = t.q + static_cast<size_t>(token) * t.q_step;
    float* scales = t.scales + token * t.scale_step;
    float* sums = t.sums + token * t.sum_step;
    std::memset(q, 0, 2 * t.q_step);
    std::memset(scales, 0, 4 * t.scale_step);
    std::memset(sums, 0, 4 * t.sum_step);
    if (codec == Codec::INT8) prepare_int8(f, q, scales, t.kp);
    else prepare_int4(f, reinterpret_cast<int8_t*>(q), scales, sums, t.kp);
}

}  // namespace flashrt::FLASHRT_ISA
