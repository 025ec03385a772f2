// Blocks whose codes are numbers of a table: ggml's IQ4_NL, IQ4_XS and MXFP4.
#pragma once

#include "plain.h"

namespace flashrt::FLASHRT_ISA {

alignas(16) constexpr int8_t UNEVEN[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
// e2m1, doubled, and 12 more.
alignas(16) constexpr int8_t FP4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct Iq4Nl : Plain<Codec::IQ4_NL, 18> {
    static constexpr bool SIGNED = true, OFFSETS = false;
    static constexpr int ZERO = 0;
    FLASHRT_INLINE B codes(int) const { return look_up_bytes(nibbles16(p + 2, p + 20), UNEVEN); }
};

struct Iq4Xs {
    static constexpr Codec CODEC = Codec::IQ4_XS;
    static constexpr int CHUNKS = 4, BYTES = 136, ZERO = 0;
    static constexpr bool SIGNED = true, OFFSETS = false;
    const uint8_t* p;
    float d;
    int32_t scales[8];  // twice, in both halves

    FLASHRT_INLINE void open(const uint8_t* unit) {
        p = unit;
        d = from_half(p);
        for (int g = 0; g < 8; ++g) scales[g] = (scale_of(g) & 0xffff) * 0x10001;
    }
    FLASHRT_INLINE int scale_of(int g) const {
        return ((p[4 + g / 2] >> (4 * (g % 2)) & 15) | ((p[2] | p[3] << 8) >> (2 * g) & 3) << 4) - 32;
    }
    FLASHRT_INLINE float scale_at(int j, int i) const { return d * static_cast<float>(scale_of(2 * j + i / 2)); }
    FLASHRT_INLINE W words(int j) const { return pair_words(scales + 2 * j); }
    FLASHRT_INLINE static I add(I sum, B codes, B x, W words) { return dot_scaled_signed(sum, codes, x, words); }
    FLASHRT_INLINE void add_rest(F&, const float*) const {}
    FLASHRT_INLINE B codes(int j) const {
        return look_up_bytes(nibbles16(p + 8 + 32 * j, p + 24 + 32 * j), UNEVEN);
    }
};

struct Mxfp4 {
    static constexpr Codec CODEC = Codec::MXFP4;
    static constexpr int CHUNKS = 1, BYTES = 34, ZERO = 12;
    static constexpr bool SIGNED = false, OFFSETS = false;
    const uint8_t* p;

    FLASHRT_INLINE void open(const uint8_t* unit) { p = unit; }
    static FLASHRT_INLINE float power(uint8_t exponent) {  // half of 2^(exponent - 127)
        const uint32_t bits = exponent < 2 ? 0x200000u << exponent : (exponent - 1u) << 23;
        float result;
        std::memcpy(&result, &bits, 4);
        return result;
    }
    FLASHRT_INLINE F scale() const { return pair(power(p[0]), power(p[17])); }
    FLASHRT_INLINE float scale_at(int, int i) const { return power(p[i / 2 * 17]); }
    FLASHRT_INLINE B codes(int) const { return look_up_bytes(nibbles16(p + 1, p + 18), FP4); }
};

}  // namespace flashrt::FLASHRT_ISA
