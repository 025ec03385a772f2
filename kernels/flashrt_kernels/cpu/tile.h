// Wide multiplication: packing of weights into panels, and the register tile that multiplies them.
//
// An element of the output is one chain of multiply-adds over the depth, in ascending order, so it does not depend on
// how tokens, columns or the depth are blocked. By AMX a link of that chain is 32 products: then the depth is blocked by
// multiples of 32.
#pragma once

#include "amx.h"
#include "rows.h"

namespace flashrt::FLASHRT_ISA {

constexpr int REGISTER_ROWS = 6;  // tokens of one register tile

#if defined(__AVX512BF16__)
constexpr bool HALF_GEMM = true;
#else
constexpr bool HALF_GEMM = false;
#endif

#if defined(__AVX512F__)
constexpr int STRIPES = 4;  // stripes of 16 columns in one register tile: 6 x 4 of 32 registers

FLASHRT_INLINE void transpose16(__m512i r[16]) {  // 16 x 16 of 32 bits
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}
#else
constexpr int STRIPES = 1;
#endif

// to[k][r] = from[r][k] for 16 x 16 numbers of 32 bits.
FLASHRT_INLINE void transpose(const void* const from[16], void* to) {
#if defined(__AVX512F__)
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from[i]);
    transpose16(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(static_cast<char*>(to) + 64 * i, r[i]);
#else
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k)
            static_cast<uint32_t*>(to)[16 * k + i] = static_cast<const uint32_t*>(from[i])[k];
#endif
}

inline void to_half(const float* x, int n, uint16_t* out) {
    int i = 0;
#if defined(__AVX512BF16__)
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i))));
#endif
    for (; i < n; ++i) out[i] = to_bf16(x[i]);
}

template <Codec codec>
void pack_rows(const uint8_t* const* rows, int count, int k, int from, int to, bool half, char* stripe) {
    alignas(64) float decoded[16][CHUNK] = {};
    alignas(64) uint16_t halves[16][CHUNK] = {};
    for (int c = from / CHUNK; c < (to + CHUNK - 1) / CHUNK; ++c) {
        for (int r = 0; r < count; ++r) {
            F w[4];
            decode<codec>(rows[r], k, c, w);
            for (int j = 0; j < 4; ++j) store(decoded[r] + 16 * j, w[j]);
            if (half) to_half(decoded[r], CHUNK, halves[r]);
        }
        const int step = half ? 32 : 16;  // weights in 16 numbers of 32 bits
        for (int j = 0; j < CHUNK; j += step) {
            const void* sources[16];
            for (int r = 0; r < 16; ++r)
                sources[r] = half ? static_cast<const void*>(halves[r] + j) : static_cast<const void*>(decoded[r] + j);
            transpose(sources, stripe);
            stripe += 1024;
        }
    }
}

inline void pack_across(Codec codec, const uint8_t* const* rows, int count, int k, int from, int to, bool half,
                        void* stripe) {
    with_codec(codec,
               [&](auto c) { pack_rows<c.value>(rows, count, k, from, to, half, static_cast<char*>(stripe)); });
}

FLASHRT_INLINE void store_pairs(uint32_t* to, F even, F odd) {  // bfloat16 of `even` in the low halves
#if defined(__AVX512BF16__)
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even.v)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd.v)));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
    float a[16], b[16];
    store(a, even);
    store(b, odd);
    for (int i = 0; i < 16; ++i) to[i] = to_bf16(a[i]) | static_cast<uint32_t>(to_bf16(b[i])) << 16;
#endif
}

template <Codec codec>
void pack_columns(const uint8_t* rows, size_t stride, int count, int k, int chunk, bool half, char* panel) {
    const size_t stripe = half ? static_cast<size_t>((count + 1) / 2) * 64 : static_cast<size_t>(count) * 64;
    const int step = half ? 2 : 1;
    for (int i = 0; i < count; i += step) {
        F w[4], next[4] = {zero(), zero(), zero(), zero()};
        prefetch(rows + (i + 8) * stride + (row_bytes(codec, CHUNK) & ~size_t{31}) * chunk);
        decode<codec>(rows + i * stride, k, chunk, w);
        if (half && i + 1 < count) decode<codec>(rows + (i + 1) * stride, k, chunk, next);
        for (int j = 0; j < 4; ++j) {
            char* to = panel + j * stripe + static_cast<size_t>(i / step) * 64;
            if (half) store_pairs(reinterpret_cast<uint32_t*>(to), w[j], next[j]);
            else store(reinterpret_cast<float*>(to), w[j]);
        }
    }
}

inline void pack_along(Codec codec, const uint8_t* rows, size_t stride, int count, int k, int chunk, bool half,
                       void* panel) {
    with_own_codec(codec,
               [&](auto c) { pack_columns<c.value>(rows, stride, count, k, chunk, half, static_cast<char*>(panel)); });
}

template <int M, int J>
FLASHRT_INLINE void tile_float(const float* a, size_t a_step, const char* panel, size_t stripe, int depth,
                               float* const* c, int column, bool accumulate) {
    F acc[M][J];
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < J; ++j) acc[m][j] = accumulate ? load(c[m] + column + 16 * j) : zero();
    for (int k = 0; k < depth; ++k) {
        F b[J];
        for (int j = 0; j < J; ++j)
            b[j] = load(reinterpret_cast<const float*>(panel + j * stripe) + static_cast<size_t>(16) * k);
        for (int m = 0; m < M; ++m) {
            const F x = splat(a[m * a_step + k]);
            for (int j = 0; j < J; ++j) acc[m][j] = fma(x, b[j], acc[m][j]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < J; ++j) store(c[m] + column + 16 * j, acc[m][j]);
}

#if defined(__AVX512BF16__)
template <int M, int J>
FLASHRT_INLINE void tile_half(const uint16_t* a, size_t a_step, const char* panel, size_t stripe, int depth,
                              float* const* c, int column, bool accumulate) {
    __m512 acc[M][J];
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < J; ++j)
            acc[m][j] = accumulate ? _mm512_loadu_ps(c[m] + column + 16 * j) : _mm512_setzero_ps();
    for (int k = 0; k < depth; k += 2) {
        __m512i b[J];
        for (int j = 0; j < J; ++j) b[j] = _mm512_loadu_si512(panel + j * stripe + static_cast<size_t>(32) * k);
        for (int m = 0; m < M; ++m) {
            int32_t pair;
            std::memcpy(&pair, a + m * a_step + k, 4);
            const __m512i x = _mm512_set1_epi32(pair);
            for (int j = 0; j < J; ++j)
                acc[m][j] = _mm512_dpbf16_ps(acc[m][j], reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(b[j]));
        }
    }
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < J; ++j) _mm512_storeu_ps(c[m] + column + 16 * j, acc[m][j]);
}
#endif

template <int M>
void tile_rows(bool half, const void* a, size_t a_step, const char* panel, size_t stripe, int depth, float* const* c,
               bool accumulate) {
    for (int j = 0; j < PANEL / 16; j += STRIPES) {
#if defined(__AVX512BF16__)
        if (half) {
            tile_half<M, STRIPES>(static_cast<const uint16_t*>(a), a_step, panel + j * stripe, stripe, depth, c, 16 * j,
                                  accumulate);
            continue;
        }
#endif
        (void)half;
        tile_float<M, STRIPES>(static_cast<const float*>(a), a_step, panel + j * stripe, stripe, depth, c, 16 * j,
                               accumulate);
    }
}

// Up to REGISTER_ROWS tokens.
inline void tile_registers(bool half, int rows, const void* a, size_t a_step, const char* p, size_t stripe, int depth,
                           float* const* c, bool accumulate) {
    switch (rows) {
        case 1: return tile_rows<1>(half, a, a_step, p, stripe, depth, c, accumulate);
        case 2: return tile_rows<2>(half, a, a_step, p, stripe, depth, c, accumulate);
        case 3: return tile_rows<3>(half, a, a_step, p, stripe, depth, c, accumulate);
        case 4: return tile_rows<4>(half, a, a_step, p, stripe, depth, c, accumulate);
        case 5: return tile_rows<5>(half, a, a_step, p, stripe, depth, c, accumulate);
        default: return tile_rows<6>(half, a, a_step, p, stripe, depth, c, accumulate);
    }
}

#if defined(__AMX_BF16__)
// Whether c[m] is c[0] + m * step.
inline bool evenly_spaced(float* const* c, int rows, ptrdiff_t step) {
    for (int m = 1; m < rows; ++m)
        if (c[m] != c[0] + m * step) return false;
    return true;
}

inline void tile_amx(int rows, const uint16_t* a, size_t a_step, const char* panel, size_t stripe, int depth,
                     float* const* c, bool accumulate) {
    by_tiles(rows, [&](int from, int count) {
        const Halves left = Halves{a, a_step}.at(from, 0);
        const Stripes right{panel, stripe};
        float* const* to = c + from;
        const ptrdiff_t step = count > 1 ? to[1] - to[0] : PANEL;
        if (evenly_spaced(to, count, step))
            return add_products(left, count, right, PANEL / 16, depth, {to[0], step}, accumulate);
        alignas(64) float sums[2 * TILE_ROWS][PANEL];
        for (int m = 0; m < count && accumulate; ++m) std::memcpy(sums[m], to[m], sizeof sums[m]);
        add_products(left, count, right, PANEL / 16, depth, {sums[0], PANEL}, accumulate);
        for (int m = 0; m < count; ++m) std::memcpy(to[m], sums[m], sizeof sums[m]);
    });
}
#endif

inline void tile(bool half, int rows, const void* a, size_t a_step, const void* panel, size_t stripe, int depth,
                 float* const* c, bool accumulate) {
    const char* p = static_cast<const char*>(panel);
#if defined(__AMX_BF16__)
    if (half) return tile_amx(rows, static_cast<const uint16_t*>(a), a_step, p, stripe, depth, c, accumulate);
#endif
    for (int m = 0; m < rows; m += REGISTER_ROWS) {
        const int count = rows - m < REGISTER_ROWS ? rows - m : REGISTER_ROWS;
        const char* from = static_cast<const char*>(a) + m * a_step * (half ? 2 : 4);
        tile_registers(half, count, from, a_step, p, stripe, depth, c + m, accumulate);
    }
}

}  // namespace flashrt::FLASHRT_ISA
