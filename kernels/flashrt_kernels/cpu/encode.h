// Encoding of rows. int4 searches for the scale and offset of each group that minimise the (weighted) squared error.
#pragma once

#include "rows.h"

namespace flashrt::FLASHRT_ISA {

struct Group {  // 32 weights and what each one's squared error counts
    F w[2], importance[2];
    float count, sum_w, sum_ww;
};

struct Fit {  // w ≈ scale * q - offset
    float scale, offset, error;
};

FLASHRT_INLINE F quantized(F w, float inverse, float offset) {
    return min(splat(15.0f), max(zero(), round(mul(add(w, splat(offset)), splat(inverse)))));
}

// Rounds to codes at (inverse, offset), then solves for the best scale and offset of those codes; offset >= 0.
FLASHRT_INLINE Fit refit(const Group& g, float inverse, float offset) {
    F q_sum = zero(), qq_sum = zero(), wq_sum = zero();
    for (int j = 0; j < 2; ++j) {
        const F q = quantized(g.w[j], inverse, offset), iq = mul(g.importance[j], q);
        q_sum = add(q_sum, iq);
        qq_sum = fma(iq, q, qq_sum);
        wq_sum = fma(iq, g.w[j], wq_sum);
    }
    const float sq = sum(q_sum), sqq = sum(qq_sum), swq = sum(wq_sum);
    const float determinant = g.count * sqq - sq * sq;
    const bool solvable = determinant > 1e-6f * g.count * sqq;  // not when all codes are equal
    float scale = 0.0f, low = 0.0f;
    if (solvable) {
        scale = (g.count * swq - g.sum_w * sq) / determinant;
        low = (sqq * g.sum_w - sq * swq) / determinant;
    } else if (g.sum_w < 0.0f) {
        low = g.sum_w / g.count;
    }
    if (low > 0.0f || (!solvable && low == 0.0f)) {
        low = 0.0f;
        scale = sqq > 0.0f ? swq / sqq : 0.0f;
    }
    if (!(scale > 0.0f)) scale = 0.0f;
    const float error = g.sum_ww - 2.0f * (scale * swq + low * g.sum_w) + scale * scale * sqq +
                        2.0f * scale * low * sq + low * low * g.count;
    return {scale, -low, error};
}

FLASHRT_INLINE Fit search(const Group& g) {
    const float low = -highest(max(zero(), max(sub(zero(), g.w[0]), sub(zero(), g.w[1]))));
    const float high = highest(max(g.w[0], g.w[1]));
    if (!(high > low)) return {0.0f, -low, 0.0f};
    Fit best = {(high - low) / 15.0f, -low, __builtin_inff()};
    for (int step = 0; step < 16; ++step) {
        // From slightly too wide a grid to one that clips the ends: outliers matter less than everything between.
        const float inverse = (14.4f + 0.25f * static_cast<float>(step)) / (high - low);
        const float offset = -low - 0.5f * (0.25f * static_cast<float>(step) - 0.6f) / inverse;
        Fit fit = refit(g, inverse, offset > 0.0f ? offset : 0.0f);
        if (fit.error < best.error) best = fit;
        for (int i = 0; i < 2 && fit.scale > 0.0f; ++i) {
            fit = refit(g, 1.0f / fit.scale, fit.offset);
            if (fit.error < best.error) best = fit;
        }
    }
    return best;
}

FLASHRT_INLINE float error_of(const Group& g, float scale, float offset) {
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    F total = zero();
    for (int j = 0; j < 2; ++j) {
        const F q = quantized(g.w[j], inverse, offset);
        const F e = sub(fma(splat(scale), q, splat(-offset)), g.w[j]);
        total = fma(mul(e, e), g.importance[j], total);
    }
    return sum(total);
}

FLASHRT_INLINE int nearest_code(float x) {
    const int code = static_cast<int>(x + 0.5f);
    return code < 0 ? 0 : code > 255 ? 255 : code;
}

struct Codes {
    int a, b;
    float error;
};

// The best pair of codes around (scale, offset).
FLASHRT_INLINE Codes choose(const Group& g, float u, float v, float scale, float offset, Codes best) {
    const int a0 = u > 0.0f ? nearest_code(scale / u) : 0, b0 = v > 0.0f ? nearest_code(offset / v) : 0;
    for (int a = a0 > 0 ? a0 - 1 : 0; a <= a0 + 1 && a < 256; ++a)
        for (int b = b0 > 0 ? b0 - 1 : 0; b <= b0 + 1 && b < 256; ++b) {
            const float error = error_of(g, u * static_cast<float>(a), v * static_cast<float>(b));
            if (error < best.error) best = {a, b, error};
        }
    return best;
}

// Past the end of the row the first weight repeats, which does not widen the range, and counts nothing.
FLASHRT_INLINE Group load_group(const float* w, const float* importance, int at, int k) {
    Group g;
    const int n = k - at;
    for (int j = 0; j < 2; ++j) {
        const int left = n - 16 * j;
        g.w[j] = left >= 16 ? load(w + at + 16 * j) : load_part(w + at + 16 * j, left, w[at]);
        if (importance) {
            g.importance[j] = left >= 16 ? load(importance + at + 16 * j) : load_part(importance + at + 16 * j, left);
        } else {
            const float ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
            g.importance[j] = load_part(ones, left);
        }
    }
    const F iw0 = mul(g.importance[0], g.w[0]), iw1 = mul(g.importance[1], g.w[1]);
    g.count = sum(add(g.importance[0], g.importance[1]));
    g.sum_w = sum(add(iw0, iw1));
    g.sum_ww = sum(fma(iw0, g.w[0], mul(iw1, g.w[1])));
    return g;
}

inline void encode_int4(const float* w, const float* importance, int k, uint8_t* row) {
    constexpr int MOST = LONGEST_ROW / INT4_GROUP;  // the bindings refuse longer rows
    const int kp = padded(k), groups = kp / INT4_GROUP;
    float scales[MOST], offsets[MOST];
    float top_scale = 0.0f, top_offset = 0.0f;
    for (int g = 0; g < groups; ++g) {
        scales[g] = offsets[g] = 0.0f;
        if (g * INT4_GROUP >= k) continue;
        const Fit fit = search(load_group(w, importance, g * INT4_GROUP, k));
        scales[g] = fit.scale;
        offsets[g] = fit.offset;
        top_scale = fit.scale > top_scale ? fit.scale : top_scale;
        top_offset = fit.offset > top_offset ? fit.offset : top_offset;
    }
    const float u = top_scale / 255.0f, v = top_offset / 255.0f;
    uint8_t* a = row + kp / 2;
    uint8_t* b = a + groups;
    std::memset(row, 0, row_bytes(Codec::INT4, k));
    for (int g = 0; g < groups && g * INT4_GROUP < k; ++g) {
        const Group group = load_group(w, importance, g * INT4_GROUP, k);
        Codes codes = choose(group, u, v, scales[g], offsets[g], {0, 0, __builtin_inff()});
        const float scale = u * static_cast<float>(codes.a);
        if (scale > 0.0f) {
            const Fit again = refit(group, 1.0f / scale, v * static_cast<float>(codes.b));
            codes = choose(group, u, v, again.scale, again.offset, codes);
        }
        a[g] = static_cast<uint8_t>(codes.a);
        b[g] = static_cast<uint8_t>(codes.b);
        const float s = u * static_cast<float>(codes.a), m = v * static_cast<float>(codes.b);
        float q[32];
        for (int j = 0; j < 2; ++j) store(q + 16 * j, quantized(group.w[j], s > 0.0f ? 1.0f / s : 0.0f, m));
        const int n = span_groups(groups, g);
        uint8_t* first = row + 16 * (g / INT4_SPAN * INT4_SPAN) + 8 * (g % INT4_SPAN);
        for (int i = 0; i < 32; ++i) {
            uint8_t& byte = first[8 * n * (i / 16) + i % 8];
            byte = static_cast<uint8_t>(byte | static_cast<int>(q[i]) << (i / 8 % 2 * 4));
        }
    }
    std::memcpy(b + groups, &u, 4);
    std::memcpy(b + groups + 4, &v, 4);
}

inline void encode_int8(const float* w, int k, uint8_t* row) {
    const int kp = padded(k);
    for (int c = 0; c < kp / CHUNK; ++c) {
        F v[4], most = zero();
        for (int j = 0; j < 4; ++j) {
            const int at = CHUNK * c + 16 * j;
            v[j] = k - at >= 16 ? load(w + at) : load_part(w + at, k - at);
            most = max(abs(v[j]), most);
        }
        const float top = highest(most);
        uint16_t half = to_bf16(top / 127.0f);
        if (bf16(reinterpret_cast<const uint8_t*>(&half)) * 127.0f < top) ++half;  // up: nothing may clip
        const float scale = bf16(reinterpret_cast<const uint8_t*>(&half));
        const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        for (int j = 0; j < 4; ++j) {
            float q[16];
            store(q, min(splat(127.0f), max(splat(-127.0f), round(mul(v[j], splat(inverse))))));
            for (int i = 0; i < 16; ++i)
                row[CHUNK * c + 16 * j + i] = static_cast<uint8_t>(static_cast<int8_t>(q[i]));
        }
        std::memcpy(row + kp + 2 * c, &half, 2);
    }
}

inline void encode(Codec codec, const float* w, const float* importance, int k, uint8_t* row) {
    if (codec == Codec::INT4) return encode_int4(w, importance, k, row);
    if (codec == Codec::INT8) return encode_int8(w, k, row);
    const size_t used = codec == Codec::F32 ? 4 : 2;
    std::memset(row + used * k, 0, used * (padded(k) - k));
    if (codec == Codec::F32) std::memcpy(row, w, used * k);
    else
        for (int i = 0; i < k; ++i) {
            const uint16_t half = to_bf16(w[i]);
            std::memcpy(row + 2 * i, &half, 2);
        }
}

inline void decode_row(Codec codec, const uint8_t* row, int k, float* out) {
    const int kp = padded(k);
    with_codec(codec, [&](auto c) {
        for (int chunk = 0; chunk < kp / CHUNK; ++chunk) {
            F w[4];
            decode<c.value>(row, k, chunk, w);
            for (int j = 0; j < 4; ++j) {
                const int at = CHUNK * chunk + 16 * j;
                if (k - at >= 16) store(out + at, w[j]);
                else store_part(out + at, w[j], k - at);
            }
        }
    });
}

}  // namespace flashrt::FLASHRT_ISA
