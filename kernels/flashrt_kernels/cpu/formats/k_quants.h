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
    float values[16];  // scales, then offsets as they are added

    FLASHRT_INLINE explicit Grouped(const uint8_t* unit) : p(unit) {
        const uint32_t a = word(p + 4), b = word(p + 8), c = word(p + 12);
        const uint32_t codes[4] = {a & 0x3f3f3f3f, (c & 0x0f0f0f0f) | (a >> 6 & 0x03030303) << 4, b & 0x3f3f3f3f,
                                   (c >> 4 & 0x0f0f0f0f) | (b >> 6 & 0x03030303) << 4};
        store(values, mul(load_u8(reinterpret_cast<const uint8_t*>(codes)), pair(from_half(p), -from_half(p + 2))));
    }
    FLASHRT_INLINE F scale(int j) const { return pair(values[2 * j], values[2 * j + 1]); }
    FLASHRT_INLINE float scale_at(int j, int i) const { return values[2 * j + i / 2]; }
    FLASHRT_INLINE float offset_at(int j, int i) const { return -values[8 + 2 * j + i / 2]; }
    FLASHRT_INLINE void add_offsets(F& acc, const float* sums, const int32_t*, const float*) const {
        acc = fma(load(values), load(sums), acc);
    }
};

struct Q4_K : Grouped<Codec::Q4_K, 144> {
    using Grouped::Grouped;
    FLASHRT_INLINE B codes(int j) const { return nibbles32(p + 16 + 32 * j); }
};

struct Q5_K : Grouped<Codec::Q5_K, 176> {
    using Grouped::Grouped;
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
    float values[16];

    FLASHRT_INLINE explicit Q6_K(const uint8_t* unit) : p(unit) {
        store(values, mul(load_i8(reinterpret_cast<const int8_t*>(p + 192)), splat(from_half(p + 208))));
    }
    FLASHRT_INLINE F scale(int j) const { return quads(values + 4 * j); }
    FLASHRT_INLINE float scale_at(int j, int i) const { return values[4 * j + i]; }
    FLASHRT_INLINE B codes(int j) const {
        const B all = load_bytes(p + 64 * (j / 2)), low = j % 2 ? high_nibbles(all) : low_nibbles(all);
        const B high = bytes_and(shifted_halves(p + 128 + 32 * (j / 2), 4 * (j % 2), 4 * (j % 2) + 2), 3);
        return bytes_or(low, shift_up(high, 4));
    }
};

}  // namespace flashrt::FLASHRT_ISA
