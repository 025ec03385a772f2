// Numbers as checkpoints store them; stored.py lists the ways. Operations go as in the gguf package, rounding included.
#pragma once

#include "simd.h"

namespace flashrt::FLASHRT_ISA {

inline float f16(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
    float value;
    if (rest < 0x400) {  // zero, or too small for an exponent
        value = static_cast<float>(rest) * 0x1p-24f;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    const uint32_t bits = sign | ((rest << 13) + (rest < 0x7c00 ? 0x38000000u : 0x70000000u));
    std::memcpy(&value, &bits, 4);
    return value;
#endif
}

// Doubles and floats that are in the file as they are in memory.
template <typename T>
inline void decode_plain(const uint8_t* p, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        T value;
        std::memcpy(&value, p + sizeof(T) * i, sizeof(T));
        out[i] = static_cast<float>(value);
    }
}

inline void decode_bf16(const uint8_t* p, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        uint16_t half;
        std::memcpy(&half, p + 2 * i, 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(out + i, &bits, 4);
    }
}

inline void decode_f16(const uint8_t* p, int64_t n, float* out) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * i))));
#endif
    for (; i < n; ++i) out[i] = f16(p + 2 * i);
}

// Bit i of four bytes.
inline int bit(const uint8_t* p, int i) { return p[i / 8] >> (i % 8) & 1; }

inline void decode_q4_0(const uint8_t* p, float* out) {
    const float d = f16(p);
    for (int i = 0; i < 16; ++i) {
        out[i] = d * static_cast<float>((p[2 + i] & 15) - 8);
        out[16 + i] = d * static_cast<float>((p[2 + i] >> 4) - 8);
    }
}

inline void decode_q4_1(const uint8_t* p, float* out) {
    const float d = f16(p), m = f16(p + 2);
    for (int i = 0; i < 16; ++i) {
        out[i] = d * static_cast<float>(p[4 + i] & 15) + m;
        out[16 + i] = d * static_cast<float>(p[4 + i] >> 4) + m;
    }
}

inline void decode_q5_0(const uint8_t* p, float* out) {
    const float d = f16(p);
    for (int i = 0; i < 16; ++i) {
        out[i] = d * static_cast<float>(((p[6 + i] & 15) | bit(p + 2, i) << 4) - 16);
        out[16 + i] = d * static_cast<float>(((p[6 + i] >> 4) | bit(p + 2, 16 + i) << 4) - 16);
    }
}

inline void decode_q5_1(const uint8_t* p, float* out) {
    const float d = f16(p), m = f16(p + 2);
    for (int i = 0; i < 16; ++i) {
        out[i] = d * static_cast<float>((p[8 + i] & 15) | bit(p + 4, i) << 4) + m;
        out[16 + i] = d * static_cast<float>((p[8 + i] >> 4) | bit(p + 4, 16 + i) << 4) + m;
    }
}

inline void decode_q8_0(const uint8_t* p, float* out) {
    const float d = f16(p);
    for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(static_cast<int8_t>(p[2 + i])) * d;
}

inline void decode_q2_k(const uint8_t* p, float* out) {  // 16 scales, 64 bytes of codes, d, dmin
    const float d = f16(p + 80), dmin = f16(p + 82);
    for (int g = 0; g < 16; ++g) {
        const float scale = d * static_cast<float>(p[g] & 15), low = dmin * static_cast<float>(p[g] >> 4);
        const uint8_t* q = p + 16 + g / 8 * 32 + g % 2 * 16;
        const int shift = g / 2 % 4 * 2;
        for (int i = 0; i < 16; ++i) out[16 * g + i] = scale * static_cast<float>(q[i] >> shift & 3) - low;
    }
}

inline void decode_q3_k(const uint8_t* p, float* out) {  // 32 bytes of high bits, 64 of low ones, 12 of scales, d
    const uint8_t *codes = p + 32, *scales = p + 96;
    const float d = f16(p + 108);
    for (int g = 0; g < 16; ++g) {
        const int low = scales[g % 8] >> g / 8 * 4 & 15, high = scales[8 + g % 4] >> g / 4 * 2 & 3;
        const float scale = d * static_cast<float>((low | high << 4) - 32);
        const uint8_t *q = codes + g / 8 * 32 + g % 2 * 16, *h = p + g % 2 * 16;
        const int shift = g / 2 % 4 * 2, bit = g / 2;
        for (int i = 0; i < 16; ++i)  // a high bit that is not set takes four off
            out[16 * g + i] = scale * static_cast<float>((q[i] >> shift & 3) - ((h[i] >> bit & 1) ^ 1) * 4);
    }
}

// The eight scales and offsets of 6 bits each that Q4_K and Q5_K pack into 12 bytes.
struct KScales {
    float scale[8], low[8];

    inline KScales(const uint8_t* p, float d, float dmin) {
        for (int j = 0; j < 4; ++j) {
            scale[j] = d * static_cast<float>(p[j] & 63);
            low[j] = dmin * static_cast<float>(p[4 + j] & 63);
            scale[4 + j] = d * static_cast<float>((p[8 + j] & 15) | (p[j] >> 2 & 0x30));
            low[4 + j] = dmin * static_cast<float>((p[8 + j] >> 4) | (p[4 + j] >> 2 & 0x30));
        }
    }
};

inline void decode_q4_k(const uint8_t* p, float* out) {  // d, dmin, 12 bytes of scales, 128 of codes
    const KScales s(p + 4, f16(p), f16(p + 2));
    for (int g = 0; g < 8; ++g) {
        const uint8_t* q = p + 16 + g / 2 * 32;
        const int shift = g % 2 * 4;
        for (int i = 0; i < 32; ++i) out[32 * g + i] = s.scale[g] * static_cast<float>(q[i] >> shift & 15) - s.low[g];
    }
}

inline void decode_q5_k(const uint8_t* p, float* out) {  // d, dmin, 12 bytes of scales, 32 of high bits, 128 of codes
    const KScales s(p + 4, f16(p), f16(p + 2));
    for (int g = 0; g < 8; ++g) {
        const uint8_t *h = p + 16, *q = p + 48 + g / 2 * 32;
        const int shift = g % 2 * 4;
        for (int i = 0; i < 32; ++i) {
            const int code = (q[i] >> shift & 15) | (h[i] >> g & 1) << 4;
            out[32 * g + i] = s.scale[g] * static_cast<float>(code) - s.low[g];
        }
    }
}

inline void decode_q6_k(const uint8_t* p, float* out) {  // 128 bytes of low bits, 64 of high ones, 16 scales, d
    const float d = f16(p + 208);
    for (int g = 0; g < 8; ++g) {
        const uint8_t *q = p + g / 4 * 64 + g % 2 * 32, *h = p + 128 + g / 4 * 32;
        const int shift = g / 2 % 2 * 4, high = g % 4 * 2;
        for (int half = 0; half < 2; ++half) {
            const float scale = d * static_cast<float>(static_cast<int8_t>(p[192 + 2 * g + half]));
            for (int i = 16 * half; i < 16 * half + 16; ++i) {
                const int code = (q[i] >> shift & 15) | (h[i] >> high & 3) << 4;
                out[32 * g + i] = scale * static_cast<float>(code - 32);
            }
        }
    }
}

constexpr int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t FP4_VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // doubled

// 16 bytes: their low nibbles, then their high ones, through a table.
inline void decode_table(const uint8_t* q, const int8_t* values, float scale, float* out) {
    for (int i = 0; i < 16; ++i) {
        out[i] = scale * static_cast<float>(values[q[i] & 15]);
        out[16 + i] = scale * static_cast<float>(values[q[i] >> 4]);
    }
}

inline void decode_iq4_xs(const uint8_t* p, float* out) {  // d, 2 bytes of high bits of scales, 4 of low ones, codes
    const float d = f16(p);
    const int high = p[2] | p[3] << 8;
    for (int g = 0; g < 8; ++g) {
        const int scale = (p[4 + g / 2] >> g % 2 * 4 & 15) | (high >> 2 * g & 3) << 4;
        decode_table(p + 8 + 16 * g, IQ4_VALUES, d * static_cast<float>(scale - 32), out + 32 * g);
    }
}

inline void decode_mxfp4(const uint8_t* p, float* out) {  // half of two to an exponent, as the values are doubled
    const uint32_t bits = p[0] < 2 ? 0x00200000u << p[0] : static_cast<uint32_t>(p[0] - 1) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    decode_table(p + 1, FP4_VALUES, scale, out);
}

// `blocks` blocks to numbers.
inline void decode_stored(Stored stored, const uint8_t* p, int64_t blocks, float* out) {
    const auto each = [&](int numbers, int bytes, auto&& decode) {
        for (int64_t i = 0; i < blocks; ++i) decode(p + i * bytes, out + i * numbers);
    };
    switch (stored) {
        case Stored::F32: return decode_plain<float>(p, blocks, out);
        case Stored::F16: return decode_f16(p, blocks, out);
        case Stored::BF16: return decode_bf16(p, blocks, out);
        case Stored::F64: return decode_plain<double>(p, blocks, out);
        case Stored::Q4_0: return each(32, 18, decode_q4_0);
        case Stored::Q4_1: return each(32, 20, decode_q4_1);
        case Stored::Q5_0: return each(32, 22, decode_q5_0);
        case Stored::Q5_1: return each(32, 24, decode_q5_1);
        case Stored::Q8_0: return each(32, 34, decode_q8_0);
        case Stored::Q2_K: return each(256, 84, decode_q2_k);
        case Stored::Q3_K: return each(256, 110, decode_q3_k);
        case Stored::Q4_K: return each(256, 144, decode_q4_k);
        case Stored::Q5_K: return each(256, 176, decode_q5_k);
        case Stored::Q6_K: return each(256, 210, decode_q6_k);
        case Stored::IQ4_NL:
            return each(32, 18, [](const uint8_t* q, float* to) { decode_table(q + 2, IQ4_VALUES, f16(q), to); });
        case Stored::IQ4_XS: return each(256, 136, decode_iq4_xs);
        case Stored::MXFP4: return each(32, 17, decode_mxfp4);
    }
}

inline bool finite(const float* values, int64_t n) {
    uint32_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, 4);
        found |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return found == 0;
}

}  // namespace flashrt::FLASHRT_ISA
