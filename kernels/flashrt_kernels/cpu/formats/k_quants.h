// Blocks of 256 weights, whose groups have scales of few bits: ggml's Q4_K, Q5_K and Q6_K.
#pragma once

#include "plain.h"

namespace flashrt::FLASHRT_ISA {

// Eight groups of 32, of which each has a scale and an offset of 6 bits.
template <Codec NAME, int EACH>
struct Grouped {
    static constexpr Codec CODEC = NAME;
    static constexpr int CHUNKS = 4, BYTES = EACH, ZERO = 0;
    static constexpr bool SIGNED = false, OFFSETS = true;
    const uint8_t* p;
    float d;
    F added;            // zeros, then the offsets as they are added
    int32_t scales[8];  // twice, in both halves

    FLASHRT_INLINE void open(const uint8_t* unit) {
        p = unit;
        d = from_half(p);
        uint32_t codes[4] = {};
        unpack(codes);
        added = mul(load_u8(reinterpret_cast<const uint8_t*>(codes)), pair(0.0f, -from_half(p + 2)));
        double_words(reinterpret_cast<const uint8_t*>(codes), scales);
    }
    // Eight bytes of scales, then eight of offsets.
    FLASHRT_INLINE void unpack(uint32_t codes[4]) const {
        const uint32_t a = word(p + 4), b = word(p + 8), c = word(p + 12);
        codes[0] = a & 0x3f3f3f3f;
        codes[1] = (c & 0x0f0f0f0f) | (a >> 6 & 0x03030303) << 4;
        codes[2] = b & 0x3f3f3f3f;
        codes[3] = (c >> 4 & 0x0f0f0f0f) | (b >> 6 & 0x03030303) << 4;
    }
    FLASHRT_INLINE float code_at(int i) const {
        uint32_t codes[4];
        unpack(codes);
        return static_cast<float>(codes[i / 4] >> (8 * (i % 4)) & 63);
    }
    FLASHRT_INLINE float scale_at(int j, int i) const { return d * code_at(2 * j + i / 2); }
    FLASHRT_INLINE float offset_at(int j, int i) const { return from_half(p + 2) * code_at(8 + 2 * j + i / 2); }
    FLASHRT_INLINE W words(int j) const { return pair_words(scales + 2 * j); }
    FLASHRT_INLINE static I add(I sum, B codes, B x, W words) { return dot_scaled(sum, codes, x, words); }
    FLASHRT_INLINE void add_rest(F& acc, const float* sums) const { acc = fma(added, load(sums), acc); }
};

struct Q4_K : Grouped<Codec::Q4_K, 144> {
    FLASHRT_INLINE B codes(int j) const { return nibbles32(p + 16 + 32 * j); }
};

struct Q5_K : Grouped<Codec::Q5_K, 176> {
    FLASHRT_INLINE B codes(int j) const {
        const B fifth = bytes_and(shifted_halves(p + 16, 2 * j, 2 * j + 1), 1);
        return bytes_or(nibbles32(p + 48 + 32 * j), shift_up(fifth, 4));
    }
};

struct Q6_K {
    static constexpr Codec CODEC = Codec::Q6_K;
    static constexpr int CHUNKS = 4, BYTES = 210, ZERO = 32;
    static constexpr bool SIGNED = false, OFFSETS = false;
    const uint8_t* p;
    float d;
    F added;  // ZERO times the scales, negative
    int16_t scales[16];

    FLASHRT_INLINE void open(const uint8_t* unit) {
        p = unit;
        d = from_half(p + 208);
        const F own = load_i8(reinterpret_cast<const int8_t*>(p + 192));
        store_i16(scales, own);
        added = mul(own, splat(-32.0f * d));
    }
    FLASHRT_INLINE float scale_at(int j, int i) const {
        return d * static_cast<float>(static_cast<int8_t>(p[192 + 4 * j + i]));
    }
    FLASHRT_INLINE W words(int j) const { return quad_words(scales + 4 * j); }
    FLASHRT_INLINE static I add(I sum, B codes, B x, W words) { return dot_scaled(sum, codes, x, words); }
    FLASHRT_INLINE void add_rest(F& acc, const float* sums) const { acc = fma(added, load(sums + 16), acc); }
    FLASHRT_INLINE B codes(int j) const {
        const B all = load_bytes(p + 64 * (j / 2)), low = j % 2 ? high_nibbles(all) : low_nibbles(all);
        const B high = bytes_and(shifted_halves(p + 128 + 32 * (j / 2), 4 * (j % 2), 4 * (j % 2) + 2), 3);
        return bytes_or(low, shift_up(high, 4));
    }
};

}  // namespace flashrt::FLASHRT_ISA
