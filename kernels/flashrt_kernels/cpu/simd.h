// Vectors of 16 lanes, whatever the machine's width: the kernels are written once and sum in the same order everywhere.
//
//   F   16 float32          I   16 int32          W   32 int16
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flashrt::FLASHRT_ISA {

#define FLASHRT_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)

struct F { __m512 v; };
struct I { __m512i v; };
struct W { __m512i v; };

FLASHRT_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
FLASHRT_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
FLASHRT_INLINE F splat(float a) { return {_mm512_set1_ps(a)}; }
FLASHRT_INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
FLASHRT_INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
FLASHRT_INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
FLASHRT_INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
FLASHRT_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FLASHRT_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
FLASHRT_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
FLASHRT_INLINE F round(F a) { return {_mm512_roundscale_ps(a.v, 8)}; }
FLASHRT_INLINE F abs(F a) { return {_mm512_abs_ps(a.v)}; }
// a * 2^n for integral n that keeps the result normal.
FLASHRT_INLINE F scale2(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }
FLASHRT_INLINE F load_bf16(const uint16_t* p) {
    const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
}
// 16 pairs of bfloat16 → the first of each pair, and the second.
FLASHRT_INLINE void load_pairs_bf16(const uint32_t* p, F& even, F& odd) {
    const __m512i w = _mm512_loadu_si512(p);
    even = {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
    odd = {_mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
FLASHRT_INLINE F load_u8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
FLASHRT_INLINE F load_i8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// Sums lanes as a tree: 16 → 8 → 4 → 2 → 1, lane i with lane i + half.
FLASHRT_INLINE float sum(F a) {
    const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
FLASHRT_INLINE float highest(F a) { return _mm512_reduce_max_ps(a.v); }
// The 16 values of a 4-bit code: scale * code - offset.
struct Table { __m512 v; };
FLASHRT_INLINE Table table(float scale, float minus_offset) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_fmadd_ps(_mm512_set1_ps(scale), codes, _mm512_set1_ps(minus_offset))};
}
// 16 bytes: low nibbles through one table, high nibbles through the other.
FLASHRT_INLINE void look_up(const uint8_t* p, Table low, Table high, F& first, F& second) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    first = {_mm512_permutexvar_ps(codes, low.v)};  // looks at the low four bits only
    second = {_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), high.v)};
}

FLASHRT_INLINE I zero_i() { return {_mm512_setzero_si512()}; }
FLASHRT_INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
FLASHRT_INLINE W load_w(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
FLASHRT_INLINE W widen_u8(const uint8_t* p) {
    return {_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FLASHRT_INLINE W widen_i8(const int8_t* p) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FLASHRT_INLINE W low_nibble(W a) { return {_mm512_and_si512(a.v, _mm512_set1_epi16(15))}; }
FLASHRT_INLINE W high_nibble(W a) { return {_mm512_srli_epi16(a.v, 4)}; }
// Multiplies every lane by the int16 that `pair` holds twice.
FLASHRT_INLINE W mul_pair(W a, const int32_t* pair) { return {_mm512_mullo_epi16(a.v, _mm512_set1_epi32(*pair))}; }
// sum + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
FLASHRT_INLINE I dot(I sum, W a, W b) { return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)}; }
FLASHRT_INLINE void store_duplicated_u8(int32_t* to, const uint8_t* from) {  // 16 bytes → 16 pairs of int16
    const __m512i a = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    _mm512_storeu_si512(to, _mm512_or_si512(a, _mm512_slli_epi32(a, 16)));
}
FLASHRT_INLINE void store_i16(int16_t* to, F a) {  // nearest, saturating; 16 lanes
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a.v)));
}

#elif defined(__AVX2__)

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct W { __m256i a, b; };

#define EACH(f) {f(x.a), f(x.b)}
FLASHRT_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FLASHRT_INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
FLASHRT_INLINE F splat(float s) { return {_mm256_set1_ps(s), _mm256_set1_ps(s)}; }
FLASHRT_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
FLASHRT_INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
FLASHRT_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
FLASHRT_INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
FLASHRT_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
FLASHRT_INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
FLASHRT_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
FLASHRT_INLINE F round(F x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
FLASHRT_INLINE F abs(F x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
FLASHRT_INLINE __m256 pow2(__m256 n) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
FLASHRT_INLINE F scale2(F x, F n) { return {_mm256_mul_ps(x.a, pow2(n.a)), _mm256_mul_ps(x.b, pow2(n.b))}; }
FLASHRT_INLINE __m256 half_bf16(const uint16_t* p) {
    const __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
}
FLASHRT_INLINE F load_bf16(const uint16_t* p) { return {half_bf16(p), half_bf16(p + 8)}; }
FLASHRT_INLINE void load_pairs_bf16(const uint32_t* p, F& even, F& odd) {
    uint32_t low[16], high[16];
    for (int i = 0; i < 16; ++i) {
        low[i] = p[i] << 16;
        high[i] = p[i] & 0xffff0000u;
    }
    std::memcpy(&even, low, sizeof low);
    std::memcpy(&odd, high, sizeof high);
}
FLASHRT_INLINE F load_u8(const uint8_t* p) {
    const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(w)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(w, w)))};
}
FLASHRT_INLINE F load_i8(const int8_t* p) {
    const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(w)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(w, w)))};
}
FLASHRT_INLINE float sum(F x) {
    const __m256 b = _mm256_add_ps(x.a, x.b);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
FLASHRT_INLINE float highest(F x) {
    const __m256 b = _mm256_max_ps(x.a, x.b);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

struct Table { float scale, minus_offset; };
FLASHRT_INLINE Table table(float scale, float minus_offset) { return {scale, minus_offset}; }
FLASHRT_INLINE void look_up(const uint8_t* p, Table low, Table high, F& first, F& second) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i a = _mm256_cvtepu8_epi32(bytes), b = _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes));
    const __m256i mask = _mm256_set1_epi32(15);
    const F lows = {_mm256_cvtepi32_ps(_mm256_and_si256(a, mask)), _mm256_cvtepi32_ps(_mm256_and_si256(b, mask))};
    const F highs = {_mm256_cvtepi32_ps(_mm256_srli_epi32(a, 4)), _mm256_cvtepi32_ps(_mm256_srli_epi32(b, 4))};
    first = fma(splat(low.scale), lows, splat(low.minus_offset));
    second = fma(splat(high.scale), highs, splat(high.minus_offset));
}

FLASHRT_INLINE I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
FLASHRT_INLINE F to_float(I x) { return EACH(_mm256_cvtepi32_ps); }
FLASHRT_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FLASHRT_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
FLASHRT_INLINE W load_w(const int16_t* p) { return {load256(p), load256(p + 16)}; }
FLASHRT_INLINE W widen_u8(const uint8_t* p) {
    return {_mm256_cvtepu8_epi16(load128(p)), _mm256_cvtepu8_epi16(load128(p + 16))};
}
FLASHRT_INLINE W widen_i8(const int8_t* p) {
    return {_mm256_cvtepi8_epi16(load128(p)), _mm256_cvtepi8_epi16(load128(p + 16))};
}
FLASHRT_INLINE W low_nibble(W x) {
    const __m256i mask = _mm256_set1_epi16(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
FLASHRT_INLINE W high_nibble(W x) { return {_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}; }
FLASHRT_INLINE W mul_pair(W x, const int32_t* pair) {
    const __m256i f = _mm256_set1_epi32(*pair);
    return {_mm256_mullo_epi16(x.a, f), _mm256_mullo_epi16(x.b, f)};
}
FLASHRT_INLINE I dot(I s, W x, W y) {
    return {_mm256_add_epi32(s.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(s.b, _mm256_madd_epi16(x.b, y.b))};
}
FLASHRT_INLINE void store_duplicated_u8(int32_t* to, const uint8_t* from) {
    for (int i = 0; i < 16; i += 8) {
        const __m256i a = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_or_si256(a, _mm256_slli_epi32(a, 16)));
    }
}
FLASHRT_INLINE void store_i16(int16_t* to, F x) {
    const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}
#undef EACH

#else

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct W { int16_t v[32]; };

#define LANES(expression)                              \
    F r;                                               \
    for (int i = 0; i < 16; ++i) r.v[i] = expression;  \
    return r
FLASHRT_INLINE F load(const float* p) { LANES(p[i]); }
FLASHRT_INLINE void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
FLASHRT_INLINE F splat(float a) { LANES(a); }
FLASHRT_INLINE F add(F a, F b) { LANES(a.v[i] + b.v[i]); }
FLASHRT_INLINE F sub(F a, F b) { LANES(a.v[i] - b.v[i]); }
FLASHRT_INLINE F mul(F a, F b) { LANES(a.v[i] * b.v[i]); }
FLASHRT_INLINE F div(F a, F b) { LANES(a.v[i] / b.v[i]); }
#if defined(__FMA__) || defined(__aarch64__)
FLASHRT_INLINE F fma(F a, F b, F c) { LANES(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
#else  // a libm call per lane would cost more than the extra rounding is worth
FLASHRT_INLINE F fma(F a, F b, F c) { LANES(a.v[i] * b.v[i] + c.v[i]); }
#endif
FLASHRT_INLINE F min(F a, F b) { LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
FLASHRT_INLINE F max(F a, F b) { LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
FLASHRT_INLINE F round(F a) {  // adding 1.5 * 2^23 leaves no room for a fraction; larger numbers have none
    LANES(__builtin_fabsf(a.v[i]) < 4194304.0f ? (a.v[i] + 12582912.0f) - 12582912.0f : a.v[i]);
}
FLASHRT_INLINE F abs(F a) { LANES(__builtin_fabsf(a.v[i])); }
FLASHRT_INLINE float pow2(float n) {
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float r;
    std::memcpy(&r, &bits, 4);
    return r;
}
FLASHRT_INLINE F scale2(F a, F n) { LANES(a.v[i] * pow2(n.v[i])); }
FLASHRT_INLINE float from_bf16(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float r;
    std::memcpy(&r, &bits, 4);
    return r;
}
FLASHRT_INLINE F load_bf16(const uint16_t* p) { LANES(from_bf16(p[i])); }
FLASHRT_INLINE void load_pairs_bf16(const uint32_t* p, F& even, F& odd) {
    uint32_t low[16], high[16];
    for (int i = 0; i < 16; ++i) {
        low[i] = p[i] << 16;
        high[i] = p[i] & 0xffff0000u;
    }
    std::memcpy(&even, low, sizeof low);
    std::memcpy(&odd, high, sizeof high);
}
FLASHRT_INLINE F load_u8(const uint8_t* p) { LANES(static_cast<float>(p[i])); }
FLASHRT_INLINE F load_i8(const int8_t* p) { LANES(static_cast<float>(p[i])); }
FLASHRT_INLINE float sum(F a) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
    return a.v[0];
}
FLASHRT_INLINE float highest(F a) {
    for (int i = 1; i < 16; ++i) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
    return a.v[0];
}

struct Table { float scale, minus_offset; };
FLASHRT_INLINE Table table(float scale, float minus_offset) { return {scale, minus_offset}; }
FLASHRT_INLINE void look_up(const uint8_t* p, Table low, Table high, F& first, F& second) {
    F lows, highs;
    for (int i = 0; i < 16; ++i) {
        lows.v[i] = static_cast<float>(p[i] & 15);
        highs.v[i] = static_cast<float>(p[i] >> 4);
    }
    first = fma(splat(low.scale), lows, splat(low.minus_offset));
    second = fma(splat(high.scale), highs, splat(high.minus_offset));
}

FLASHRT_INLINE I zero_i() { return I{}; }
FLASHRT_INLINE F to_float(I a) { LANES(static_cast<float>(a.v[i])); }
#undef LANES
#define LANES(expression)                              \
    W r;                                               \
    for (int i = 0; i < 32; ++i) r.v[i] = expression;  \
    return r
FLASHRT_INLINE W load_w(const int16_t* p) { LANES(p[i]); }
FLASHRT_INLINE W widen_u8(const uint8_t* p) { LANES(p[i]); }
FLASHRT_INLINE W widen_i8(const int8_t* p) { LANES(p[i]); }
FLASHRT_INLINE W low_nibble(W a) { LANES(static_cast<int16_t>(a.v[i] & 15)); }
FLASHRT_INLINE W high_nibble(W a) { LANES(static_cast<int16_t>(a.v[i] >> 4)); }
FLASHRT_INLINE W mul_pair(W a, const int32_t* pair) {
    const int16_t f = static_cast<int16_t>(*pair & 0xffff);
    LANES(static_cast<int16_t>(a.v[i] * f));
}
#undef LANES
FLASHRT_INLINE I dot(I s, W a, W b) {
    for (int i = 0; i < 16; ++i)
        s.v[i] += static_cast<int32_t>(a.v[2 * i]) * b.v[2 * i] + static_cast<int32_t>(a.v[2 * i + 1]) * b.v[2 * i + 1];
    return s;
}
FLASHRT_INLINE void store_duplicated_u8(int32_t* to, const uint8_t* from) {
    for (int i = 0; i < 16; ++i) to[i] = from[i] * 0x10001;
}
FLASHRT_INLINE void store_i16(int16_t* to, F a) {
    a = round(a);
    for (int i = 0; i < 16; ++i) {
        const float c = a.v[i] < -32768.0f ? -32768.0f : a.v[i] > 32767.0f ? 32767.0f : a.v[i];
        to[i] = static_cast<int16_t>(c);
    }
}

#endif

FLASHRT_INLINE F zero() { return splat(0.0f); }

FLASHRT_INLINE F load_part(const float* p, int n, float fill = 0.0f) {  // the first n of 16 lanes
    float buffer[16];
    for (int i = 0; i < 16; ++i) buffer[i] = i < n ? p[i] : fill;
    return load(buffer);
}
FLASHRT_INLINE void store_part(float* p, F a, int n) {
    float buffer[16];
    store(buffer, a);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

FLASHRT_INLINE uint16_t to_bf16(float x) {  // nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 64);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

FLASHRT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// e^x to about one unit in the last place, for x clamped to [-87.3, 88]: always normal. NaN stays NaN.
FLASHRT_INLINE F exp(F x) {
    const F lowest = splat(-87.33654f);
    const F c = min(splat(88.0f), max(lowest, x));  // this order lets NaN through
    const F n = round(mul(c, splat(1.44269504f)));
    F r = fma(n, splat(-0.693359375f), c);
    r = fma(n, splat(2.12194440e-4f), r);
    F p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(0.5f));
    p = add(fma(mul(r, r), p, r), splat(1.0f));
    return scale2(p, n);
}

FLASHRT_INLINE F sigmoid(F x) { return div(splat(1.0f), add(splat(1.0f), exp(sub(zero(), x)))); }
FLASHRT_INLINE F tanh(F x) {  // 2 sigmoid(2x) - 1: absolute error about 1e-7, which is what gelu and softcap need
    return fma(splat(2.0f), sigmoid(add(x, x)), splat(-1.0f));
}

}  // namespace flashrt::FLASHRT_ISA
