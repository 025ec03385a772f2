// Blocks of 32 weights with a scale, and some with an offset: ggml's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.
#pragma once

#include "../isa.h"
#include "../simd.h"

namespace flashrt::FLASHRT_ISA {

FLASHRT_INLINE uint32_t word(const uint8_t* p) {
    uint32_t result;
    std::memcpy(&result, p, 4);
    return result;
}

// Two blocks, of `EACH` bytes, which begin with a float16 scale.
template <Codec NAME, int EACH>
struct Plain {
    static constexpr Codec CODEC = NAME;
    static constexpr int CHUNKS = 1, BYTES = 2 * EACH;
    const uint8_t* p;

    FLASHRT_INLINE void open(const uint8_t* unit) { p = unit; }
    FLASHRT_INLINE F scale() const { return pair(from_half(p), from_half(p + EACH)); }
    FLASHRT_INLINE float scale_at(int, int i) const { return from_half(p + i / 2 * EACH); }
};

// Blocks that have a float16 offset after their scale, which is added.
template <Codec NAME, int EACH>
struct PlainWithOffset : Plain<NAME, EACH> {
    static constexpr bool SIGNED = false, OFFSETS = true;
    static constexpr int ZERO = 0;

    FLASHRT_INLINE float offset_at(int, int i) const { return -from_half(this->p + i / 2 * EACH + 2); }
    FLASHRT_INLINE F added() const { return pair(from_half(this->p + 2), from_half(this->p + EACH + 2)); }
};

struct Q4_0 : Plain<Codec::Q4_0, 18> {
    static constexpr bool SIGNED = false, OFFSETS = false;
    static constexpr int ZERO = 8;
    FLASHRT_INLINE B codes(int) const { return nibbles16(p + 2, p + 20); }
};

struct Q4_1 : PlainWithOffset<Codec::Q4_1, 20> {
    FLASHRT_INLINE B codes(int) const { return nibbles16(p + 4, p + 24); }
};

// Codes of four bits, and the fifth bits of two blocks.
FLASHRT_INLINE B five_bits(B codes, const uint8_t* first, const uint8_t* second) {
    return bytes_or(codes, bits_as_bytes(word(first) | static_cast<uint64_t>(word(second)) << 32, 16));
}

struct Q5_0 : Plain<Codec::Q5_0, 22> {
    static constexpr bool SIGNED = false, OFFSETS = false;
    static constexpr int ZERO = 16;
    FLASHRT_INLINE B codes(int) const { return five_bits(nibbles16(p + 6, p + 28), p + 2, p + 24); }
};

struct Q5_1 : PlainWithOffset<Codec::Q5_1, 24> {
    FLASHRT_INLINE B codes(int) const { return five_bits(nibbles16(p + 8, p + 32), p + 4, p + 28); }
};

struct Q8_0 : Plain<Codec::Q8_0, 34> {
    static constexpr bool SIGNED = true, OFFSETS = false;
    static constexpr int ZERO = 0;
    FLASHRT_INLINE B codes(int) const { return load_halves(p + 2, p + 36); }
};

}  // namespace flashrt::FLASHRT_ISA
