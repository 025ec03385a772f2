// Attention of a wide pass's tile over a segment of keys and values in bfloat16, by AMX.
//
// Queries and weights are split into two bfloat16 numbers each, whose sum has 16 bits.
#pragma once

#include "amx.h"
#include "attend.h"

namespace flashrt::FLASHRT_ISA {

#if defined(__AMX_BF16__)

constexpr int HALF_POSITIONS = 2 * POSITIONS;  // packed at a time: as many bytes

inline bool by_amx(const Segment& s) {
    return s.wide && s.codecs.key == Codec::BF16 && s.dim % TILE_DEPTH == 0 && s.values % 16 == 0;
}

// Floats become bfloat16 numbers, then as many that are what is left of each, in their place: `n` of either, of which
// those behind the first `count`, a multiple of 16, are zero.
inline void split(float* row, int count, int n) {
    alignas(64) float whole[SCORES > WIDEST_HEAD ? SCORES : WIDEST_HEAD];
    std::memcpy(whole, row, 4 * static_cast<size_t>(count));
    __m256i* high = reinterpret_cast<__m256i*>(row);
    __m256i* low = high + n / 16;
    for (int i = 0; i < n / 16; ++i) {
        const __m512 x = 16 * i < count ? _mm512_load_ps(whole + 16 * i) : _mm512_setzero_ps();
        const __m256i h = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
        const __m512 seen = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
        _mm256_storeu_si256(high + i, h);
        _mm256_storeu_si256(low + i, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_sub_ps(x, seen))));
    }
}

// [n16 / 16][D / 2][16][2]: keys from position `begin`; positions past the end are zero.
inline void pack_key_pairs(const Segment& s, int begin, int n16, char* to) {
    static const uint16_t nothing[WIDEST_HEAD] = {};
    for (int p = 0; p < n16; p += 16) {
        const void* keys[16];
        for (int i = 0; i < 16; ++i)
            keys[i] = begin + p + i < s.end ? pair_at<uint16_t>(s, begin + p + i) : nothing;
        for (int d = 0; d < s.dim; d += 32, to += 1024) {
            const void* from[16];
            for (int i = 0; i < 16; ++i) from[i] = static_cast<const uint16_t*>(keys[i]) + d;
            transpose(from, to);
        }
    }
}

// [V / 16][n / 2][16][2]: values from position `begin`; n is a multiple of 32, those past the end are zero.
inline void pack_value_pairs(const Segment& s, int begin, int n, char* to) {
    static const uint16_t nothing[WIDEST_HEAD] = {};
    const int behind = s.codecs.keys_only ? 0 : s.dim;
    auto at = [&](int position) { return position < s.end ? pair_at<uint16_t>(s, position) + behind : nothing; };
    const size_t stripe = 32 * static_cast<size_t>(n);
    for (int p = 0; p < n; p += 2) {
        const uint16_t *even = at(begin + p), *odd = at(begin + p + 1);
        for (int d = 0; d < s.values; d += 16) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + d)));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + d)));
            _mm512_storeu_si512(to + d / 16 * stripe + 32 * p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

inline void attend_halves(const Segment& s) {
    const int n = s.end - s.begin, n16 = (n + 15) / 16 * 16;
    char* panel = reinterpret_cast<char*>(s.panel);
    auto rows_of = [](const float* data, size_t step) {
        return Halves{reinterpret_cast<const uint16_t*>(data), 2 * step, 2, step};
    };
    for (int q = 0; q < s.queries; ++q) split(s.q + static_cast<size_t>(q) * s.dim, s.dim, s.dim);
    for (int p = 0; p < n16; p += HALF_POSITIONS) {
        const int count = n16 - p < HALF_POSITIONS ? n16 - p : HALF_POSITIONS;
        pack_key_pairs(s, s.begin + p, count, panel);
        const Stripes keys{panel, 32 * static_cast<size_t>(s.dim)};
        by_tiles(s.queries, [&](int q, int rows) {
            const Columns scores{s.scores + static_cast<size_t>(q) * SCORES + p, SCORES};
            add_products(rows_of(s.q, s.dim).at(q, 0), rows, keys, count / 16, s.dim, scores, false);
        });
    }
    const int n32 = (n + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
    for (int q = 0; q < s.queries; ++q) {
        soften(s, q, n16);
        split(s.scores + static_cast<size_t>(q) * SCORES, n16, SCORES);
    }
    for (int p = 0; p < n32; p += HALF_POSITIONS) {
        const int count = n32 - p < HALF_POSITIONS ? n32 - p : HALF_POSITIONS;
        pack_value_pairs(s, s.begin + p, count, panel);
        const Stripes values{panel, 32 * static_cast<size_t>(count)};
        by_tiles(s.queries, [&](int q, int rows) {
            const Columns to{s.acc + static_cast<size_t>(q) * s.values, s.values};
            add_products(rows_of(s.scores, SCORES).at(q, p), rows, values, s.values / 16, count, to, p > 0);
        });
    }
}

#endif

inline void attend_segment(const Segment& s) {
#if defined(__AMX_BF16__)
    if (by_amx(s)) return attend_halves(s);
#endif
    attend(s);
}

}  // namespace flashrt::FLASHRT_ISA
