// Keys and values as caches hold them; see KvCodecs. Q8_0 and Q4_0 are rounded as ggml rounds them.
#pragma once

#include "tile.h"

namespace flashrt::FLASHRT_ISA {

FLASHRT_INLINE uint16_t to_float16(float x) {  // nearest, ties to even
#if defined(__F16C__)
    return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (size < 0x38800000) {  // too small for an exponent: steps of 2^-24
        float steps;
        std::memcpy(&steps, &size, 4);
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(steps * 16777216.0f)));
    }
    return static_cast<uint16_t>(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
#endif
}

// Writes the scale of 32 numbers. False where not all are finite: then it is not a number, nor is what it multiplies.
inline bool put_scale(const float* x, float scale, uint8_t* to) {
    float odd = 0.0f;
    for (int i = 0; i < 32; ++i) odd += x[i] * 0.0f;
    const uint16_t stored = to_float16(odd == 0.0f ? scale : odd);  // a sum would lose the sign of -0
    std::memcpy(to, &stored, 2);
    return odd == 0.0f;
}

// 32 numbers: a scale, and codes of -127 to 127.
inline void encode_q8_0(const float* x, uint8_t* to) {
    float top = 0.0f;
    for (int i = 0; i < 32; ++i) top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
    const float scale = top / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    if (!put_scale(x, scale, to)) return static_cast<void>(std::memset(to + 2, 0, 32));
    for (int i = 0; i < 32; ++i) {
        const float steps = std::fabs(x[i] * inverse), below = std::floor(steps);
        const float code = below + (steps - below >= 0.5f ? 1.0f : 0.0f);
        to[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(std::copysign(code, x[i])));
    }
}

// 32 numbers: a scale, which makes the largest of them -8, and codes 8 higher than what they stand for.
inline void encode_q4_0(const float* x, uint8_t* to) {
    float most = 0.0f;
    for (int i = 0; i < 32; ++i) most = std::fabs(x[i]) > std::fabs(most) ? x[i] : most;
    const float scale = most / -8.0f, inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    if (!put_scale(x, scale, to)) return static_cast<void>(std::memset(to + 2, 0, 16));
    uint8_t codes[32];
    for (int i = 0; i < 32; ++i) {
        const float code = x[i] * inverse + 8.5f;
        codes[i] = static_cast<uint8_t>(code < 15.0f ? code : 15.0f);
    }
    for (int i = 0; i < 16; ++i) to[2 + i] = static_cast<uint8_t>(codes[i] | codes[16 + i] << 4);
}

inline void encode_blocks(Codec codec, const float* x, int dim, uint8_t* to) {
    const auto encode = codec == Codec::Q8_0 ? encode_q8_0 : encode_q4_0;
    for (int at = 0; at < padded(dim); at += 32, to += kept_block(codec).bytes) {
        float block[32] = {};
        const int count = dim - at < 32 ? dim - at : 32;
        if (count > 0) std::memcpy(block, x + at, 4 * static_cast<size_t>(count));
        encode(block, to);
    }
}

// A key or a value of a head.
inline void encode_kv(Codec codec, const float* x, int dim, void* to) {
    if (codec == Codec::F32) std::memcpy(to, x, 4 * static_cast<size_t>(dim));
    else if (codec == Codec::BF16) to_half(x, dim, static_cast<uint16_t*>(to));
    else encode_blocks(codec, x, dim, static_cast<uint8_t*>(to));
}

}  // namespace flashrt::FLASHRT_ISA
