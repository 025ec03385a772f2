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
    FLASHRT_INLINE explicit Iq4Nl(const uint8_t* unit) : Plain{unit} {}
    FLASHRT_INLINE B codes(int) const { return look_up_bytes(nibbles16(p + 2, p + 20), UNEVEN); }
};

struct Iq4Xs {
    static constexpr Codec CODEC = Codec::IQ4_XS;
    static constexpr int CHUNKS = 4, BYTES = 136, ZERO = 0;
    static constexpr bool SIGNED = true, OFFSETS = false;
    const uint8_t* p;
    float values[8];

    FLASHRT_INLINE explicit Iq4Xs(const uint8_t* unit) : p(unit) {
        const float d = from_half(p);
        const int high = p[2] | p[3] << 8;
        for (int g = 0; g < 8; ++g) {
            const int scale = (p[4 + g / 2] >> (4 * (g % 2)) & 15) | (high >> (2 * g) & 3) << 4;
            values[g] = d * static_cast<float>(scale - 32);
        }
    }
    FLASHRT_INLINE F scale(int j) const { return pair(values[2 * j], values[2 * j + 1]); }
    FLASHRT_INLINE float scale_at(int j, int i) const { return values[2 * j + i / 2]; }
    FLASHRT_INLINE B codes(int j) const {
        return look_up_bytes(nibbles16(p + 8 + 32 * j, p + 24 + 32 * j), UNEVEN);
    }
};

struct Mxfp4 {
    static constexpr Codec CODEC = Codec::MXFP4;
    static constexpr int CHUNKS = 1, BYTES = 34, ZERO = 12;
    static constexpr bool SIGNED = false, OFFSETS = false;
    const uint8_t* p;

    FLASHRT_INLINE explicit Mxfp4(const uint8_t* unit) : p(unit) {}
    static FLASHRT_INLINE float power(uint8_t exponent) {  // half of 2^(exponent - 127)
        const uint32_t bits = exponent < 2 ? 0x200000u << exponent : (exponent - 1u) << 23;
        float result;
        std::memcpy(&result, &bits, 4);
        return result;
    }
    FLASHRT_INLINE F scale(int) const { return pair(power(p[0]), power(p[17])); }
    FLASHRT_INLINE float scale_at(int, int i) const { return power(p[i / 2 * 17]); }
    FLASHRT_INLINE B codes(int) const { return look_up_bytes(nibbles16(p + 1, p + 18), FP4); }
};

}  // namespace flashrt::FLASHRT_ISA
