// Numbers as checkpoints store them; stored.py lists the ways. Operations go as in the gguf package, rounding included.
#pragma once

#include "encode.h"

namespace flashrt::FLASHRT_ISA {

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
    for (; i < n; ++i) out[i] = from_half(p + 2 * i);
}

inline void decode_q2_k(const uint8_t* p, float* out) {  // 16 scales, 64 bytes of codes, d, dmin
    const float d = from_half(p + 80), dmin = from_half(p + 82);
    for (int g = 0; g < 16; ++g) {
        const float scale = d * static_cast<float>(p[g] & 15), low = dmin * static_cast<float>(p[g] >> 4);
        const uint8_t* q = p + 16 + g / 8 * 32 + g % 2 * 16;
        const int shift = g / 2 % 4 * 2;
        for (int i = 0; i < 16; ++i) out[16 * g + i] = scale * static_cast<float>(q[i] >> shift & 3) - low;
    }
}

inline void decode_q3_k(const uint8_t* p, float* out) {  // 32 bytes of high bits, 64 of low ones, 12 of scales, d
    const uint8_t *codes = p + 32, *scales = p + 96;
    const float d = from_half(p + 108);
    for (int g = 0; g < 16; ++g) {
        const int low = scales[g % 8] >> g / 8 * 4 & 15, high = scales[8 + g % 4] >> g / 4 * 2 & 3;
        const float scale = d * static_cast<float>((low | high << 4) - 32);
        const uint8_t *q = codes + g / 8 * 32 + g % 2 * 16, *h = p + g % 2 * 16;
        const int shift = g / 2 % 4 * 2, bit = g / 2;
        for (int i = 0; i < 16; ++i)  // a high bit that is not set takes four off
            out[16 * g + i] = scale * static_cast<float>((q[i] >> shift & 3) - ((h[i] >> bit & 1) ^ 1) * 4);
    }
}

// `blocks` blocks of a codec that packs keep.
inline void decode_kept_blocks(Codec codec, StoredBlock block, const uint8_t* p, int64_t blocks, float* out) {
    const int64_t whole = block.numbers < CHUNK ? blocks / 2 * 2 : blocks;  // small ones are decoded in pairs
    if (whole > 0) decode_row(codec, p, static_cast<int>(whole * block.numbers), out);
    if (whole == blocks) return;
    uint8_t pair[2 * 34] = {};
    std::memcpy(pair, p + whole * block.bytes, block.bytes);
    decode_row(codec, pair, block.numbers, out + whole * block.numbers);
}

// `blocks` blocks to numbers.
inline void decode_stored(Stored stored, const uint8_t* p, int64_t blocks, float* out) {
    const StoredBlock block = block_of(stored);
    const auto each = [&](auto&& decode) {
        for (int64_t i = 0; i < blocks; ++i) decode(p + i * block.bytes, out + i * block.numbers);
    };
    const auto kept = [&](Codec codec) { decode_kept_blocks(codec, block, p, blocks, out); };
    switch (stored) {
        case Stored::F32: return decode_plain<float>(p, blocks, out);
        case Stored::F16: return decode_f16(p, blocks, out);
        case Stored::BF16: return decode_bf16(p, blocks, out);
        case Stored::F64: return decode_plain<double>(p, blocks, out);
        case Stored::Q2_K: return each(decode_q2_k);
        case Stored::Q3_K: return each(decode_q3_k);
        case Stored::Q4_0: return kept(Codec::Q4_0);
        case Stored::Q4_1: return kept(Codec::Q4_1);
        case Stored::Q5_0: return kept(Codec::Q5_0);
        case Stored::Q5_1: return kept(Codec::Q5_1);
        case Stored::Q8_0: return kept(Codec::Q8_0);
        case Stored::Q4_K: return kept(Codec::Q4_K);
        case Stored::Q5_K: return kept(Codec::Q5_K);
        case Stored::Q6_K: return kept(Codec::Q6_K);
        case Stored::IQ4_NL: return kept(Codec::IQ4_NL);
        case Stored::IQ4_XS: return kept(Codec::IQ4_XS);
        case Stored::MXFP4: return kept(Codec::MXFP4);
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
