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

// What kept rows meet: codes 256 c + f, c and f signed bytes, in steps of a scale that `each` numbers share; all c of a
// token, then all f. Where others have f lie sums of four codes each, as integers. `sums` has sums of x, 32 numbers for
// 256 of x: eight zeros, those of each 32, and those of each 16.
struct KeptTarget {
    int8_t *coarse, *fine;
    int32_t* lanes;
    float* scales;
    float* sums;

    FLASHRT_INLINE KeptTarget(const Tokens& t, int token)
        : coarse(reinterpret_cast<int8_t*>(t.q + token * t.q_step)), fine(coarse + t.q_step),
          lanes(reinterpret_cast<int32_t*>(t.f + token * t.f_step)), scales(t.scales + token * t.scale_step),
          sums(t.sums + token * t.sum_step) {}

    // 16 numbers, rounded, from `at` on.
    FLASHRT_INLINE void put(int at, F codes, float scale) const {
        const F c = round(mul(codes, splat(1.0f / 256.0f)));
        const F f = max(splat(-127.0f), sub(codes, mul(c, splat(256.0f))));
        store_i8(coarse + at, c);
        store_i8(fine + at, f);
        int32_t total = 0;
        for (int i = at / 4; i < at / 4 + 4; ++i) {
            lanes[i] = 0;
            for (int j = 4 * i; j < 4 * i + 4; ++j) lanes[i] += 256 * coarse[j] + fine[j];
            total += lanes[i];
        }
        const int place = at % SPAN_WEIGHTS / 16;
        float* own = sums + at / SPAN_WEIGHTS * 32;
        own[16 + place] = static_cast<float>(total) * scale;
        own[place / 2] = 0.0f;
        if (place % 2) own[8 + place / 2] = own[15 + place] + own[16 + place];
    }
};

inline void prepare_kept(const float* x, int from, int n, int token, Tokens& t) {
    const KeptTarget to(t, token);
    for (int begin = 0; begin < n; begin += t.each) {
        const int end = begin + t.each < n ? begin + t.each : n;
        F most = zero(), poison = zero();
        for (int i = begin; i < end; i += 16) {
            most = max(most, abs(load(x + i)));
            poison = fma(load(x + i), zero(), poison);  // NaN if x is not finite, and then so is the result
        }
        const float top = highest(most), levels = 32512.0f;
        const float scale = (top > 1e-30f ? top / levels : 0.0f) + sum(poison);
        const F inverse = splat(top > 1e-30f ? levels / top : 0.0f);
        for (int i = begin; i < end; i += 16) to.put(from + i, round(mul(load(x + i), inverse)), scale);
        to.scales[(from + begin) / t.each] = scale;
    }
}

// Rounds one token's activations, or copies them, padded, for float codecs.
inline void prepare(Codec codec, const float* x, int token, Tokens& t) {
    if (is_kept(codec)) {
        prepare_kept(x, 0, t.k, token, t);
        for (int i = t.k; i < t.kp; i += 16) KeptTarget(t, token).put(i, zero(), 0.0f);
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
