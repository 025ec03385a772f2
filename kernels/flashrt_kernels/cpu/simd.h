// Vectors of 16 lanes, whatever the machine's width: the kernels are written once and sum in the same order everywhere.
//
//   F   16 float32      I   16 int32      W   32 int16      B   64 bytes
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flashrt::FLASHRT_ISA {

#define FLASHRT_INLINE inline __attribute__((always_inline))
#define FLASHRT_LAMBDA __attribute__((always_inline))

#if defined(__AVX512F__)

struct F { __m512 v; };
struct I { __m512i v; };
struct W { __m512i v; };
struct B { __m512i v; };

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
FLASHRT_INLINE F above(F a, F t) {  // a where it is more than t or no number, else zero
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, t.v, _CMP_NLE_UQ), a.v)};
}
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
// out[i] = sum(a[i]) for N = 1, 2, 4, 8 or 16 vectors, folded together: lanes are added in the order of `sum`.
template <int N>
FLASHRT_INLINE void sum_each(const F* a, float* out) {
    F v[N];
    for (int i = 0; i < N; ++i) v[i] = a[i];
    auto fold = [&](int n, auto low, auto high) FLASHRT_LAMBDA {
        for (int i = 0; i < (n + 1) / 2; ++i) {
            const __m512 p = v[2 * i].v, q = v[2 * i + 1 < n ? 2 * i + 1 : 2 * i].v;
            v[i].v = _mm512_add_ps(low(p, q), high(p, q));
        }
    };
    using R = __m512;
    constexpr int N2 = (N + 1) / 2, N3 = (N2 + 1) / 2, N4 = (N3 + 1) / 2;
    fold(N, [](R p, R q) FLASHRT_LAMBDA { return _mm512_shuffle_f32x4(p, q, 0x44); },
         [](R p, R q) FLASHRT_LAMBDA { return _mm512_shuffle_f32x4(p, q, 0xee); });
    fold(N2, [](R p, R q) FLASHRT_LAMBDA { return _mm512_shuffle_f32x4(p, q, 0x88); },
         [](R p, R q) FLASHRT_LAMBDA { return _mm512_shuffle_f32x4(p, q, 0xdd); });
    fold(N3, [](R p, R q) FLASHRT_LAMBDA { return _mm512_shuffle_ps(p, q, 0x44); },
         [](R p, R q) FLASHRT_LAMBDA { return _mm512_shuffle_ps(p, q, 0xee); });
    fold(N4, [](R p, R q) FLASHRT_LAMBDA { return _mm512_shuffle_ps(p, q, 0x88); },
         [](R p, R q) FLASHRT_LAMBDA { return _mm512_shuffle_ps(p, q, 0xdd); });
    float lanes[16];
    store(lanes, v[0]);
    for (int i = 0; i < N; ++i) out[i] = lanes[4 * (i % 4) + i / 4];
}
FLASHRT_INLINE float highest(F a) { return _mm512_reduce_max_ps(a.v); }
FLASHRT_INLINE F add_neighbours(F a, F b) {  // a[0] + a[1], a[2] + a[3], and so on, then those of b
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_add_ps(_mm512_permutex2var_ps(a.v, even, b.v), _mm512_permutex2var_ps(a.v, odd, b.v))};
}
// The 16 values of a 4-bit code: scale * code - offset.
struct Table { __m512 v; };
FLASHRT_INLINE Table table(float scale, float minus_offset) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_fmadd_ps(_mm512_set1_ps(scale), codes, _mm512_set1_ps(minus_offset))};
}
// 8 bytes: their low nibbles, then their high ones, through the table.
FLASHRT_INLINE F look_up(const uint8_t* p, Table t) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i both = _mm_unpacklo_epi64(bytes, _mm_srli_epi16(bytes, 4));
    return {_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(both), t.v)};  // looks at the low four bits only
}

FLASHRT_INLINE I zero_i() { return {_mm512_setzero_si512()}; }
FLASHRT_INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
FLASHRT_INLINE W load_w(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
FLASHRT_INLINE W widen_i8(const int8_t* p) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// sum + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
FLASHRT_INLINE I dot(I sum, W a, W b) { return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)}; }
FLASHRT_INLINE void store_i16(int16_t* to, F a) {  // nearest, saturating; 16 lanes
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a.v)));
}

FLASHRT_INLINE void store_i8(int8_t* to, F a) {  // nearest, saturating; 16 lanes
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

FLASHRT_INLINE void store_i(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
FLASHRT_INLINE I nearest(F a) { return {_mm512_cvtps_epi32(a.v)}; }
FLASHRT_INLINE I add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
FLASHRT_INLINE I splat_i(int32_t a) { return {_mm512_set1_epi32(a)}; }
template <int N> FLASHRT_INLINE I left(I a) { return {_mm512_slli_epi32(a.v, N)}; }

FLASHRT_INLINE B load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
FLASHRT_INLINE B load_bytes(const void* p, int n) {  // the first n of 64, then zeros
    return {_mm512_maskz_loadu_epi8(n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0}, p)};
}
// Keeps a vector in a register: compilers like to read it from memory again for each use, and loads are what is scarce.
FLASHRT_INLINE B hold(B a) {
    asm("" : "+v"(a.v));
    return a;
}
FLASHRT_INLINE void store_bytes(void* p, B a) { _mm512_storeu_si512(p, a.v); }
FLASHRT_INLINE B low_nibbles(B a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
FLASHRT_INLINE B high_nibbles(B a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// Bits N and N + 1 of each byte, those below them included; `settle` takes these out of sums of products.
template <int N> FLASHRT_INLINE B two_bits(B a) {
    return N == 6 ? a : B{_mm512_and_si512(a.v, _mm512_set1_epi8(static_cast<char>((4 << N) - 1)))};
}
// sums[4 k + p] of products with two_bits<2 k> become those with these bits alone, as numbers of 0 to 3.
FLASHRT_INLINE void settle(I sums[16]) {
    for (int p = 0; p < 4; ++p) {
        sums[12 + p] = {_mm512_srai_epi32(_mm512_sub_epi32(sums[12 + p].v, sums[8 + p].v), 6)};
        sums[8 + p] = {_mm512_srai_epi32(_mm512_sub_epi32(sums[8 + p].v, sums[4 + p].v), 4)};
        sums[4 + p] = {_mm512_srai_epi32(_mm512_sub_epi32(sums[4 + p].v, sums[p].v), 2)};
    }
}
FLASHRT_INLINE B splat_quad(int32_t a) { return {_mm512_set1_epi32(a)}; }  // four bytes, in every lane
// r[i] becomes quarter i of each of the four.
FLASHRT_INLINE void transpose_quarters(B r[4]) {
    const __m512i a = _mm512_shuffle_i32x4(r[0].v, r[1].v, 0x44), b = _mm512_shuffle_i32x4(r[0].v, r[1].v, 0xee);
    const __m512i c = _mm512_shuffle_i32x4(r[2].v, r[3].v, 0x44), d = _mm512_shuffle_i32x4(r[2].v, r[3].v, 0xee);
    r[0] = {_mm512_shuffle_i32x4(a, c, 0x88)};
    r[1] = {_mm512_shuffle_i32x4(a, c, 0xdd)};
    r[2] = {_mm512_shuffle_i32x4(b, d, 0x88)};
    r[3] = {_mm512_shuffle_i32x4(b, d, 0xdd)};
}
// Numbers of 16 bits = 256 * coarse + fine, both signed bytes: lane i has those of lane i of the four.
FLASHRT_INLINE void split_words(const I m[4], I& coarse, I& fine) {
    const __m512i half = _mm512_set1_epi16(128);  // so that the upper byte is rounded
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 2, 10, 4, 12, 6, 14, 1, 9, 3, 11, 5, 13, 7, 15));
    const __m512i a = _mm512_shuffle_epi8(_mm512_add_epi16(_mm512_packs_epi32(m[0].v, m[1].v), half), order);
    const __m512i b = _mm512_shuffle_epi8(_mm512_add_epi16(_mm512_packs_epi32(m[2].v, m[3].v), half), order);
    fine = {_mm512_xor_si512(_mm512_unpacklo_epi16(a, b), _mm512_set1_epi8(-128))};
    coarse = {_mm512_unpackhi_epi16(a, b)};
}
FLASHRT_INLINE F load_doubled_u8(const uint8_t* p) {  // 8 bytes, each in two lanes
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes)))};
}
// Of 8 numbers, every other one from `odd` on, each in four lanes.
FLASHRT_INLINE __m512i quarters(const void* p, int odd) {
    const __m512i order = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    const __m512i all = _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return _mm512_permutexvar_epi32(odd ? _mm512_add_epi32(order, _mm512_set1_epi32(1)) : order, all);
}
FLASHRT_INLINE B quarters(const int32_t* p, int odd) { return {quarters(static_cast<const void*>(p), odd)}; }
FLASHRT_INLINE F quarters(const float* p, int odd) {
    return {_mm512_castsi512_ps(quarters(static_cast<const void*>(p), odd))};
}
// sum + the products of four unsigned a and signed b; sums of two of them must fit in 16 bits.
FLASHRT_INLINE I dot(I sum, B a, B b) { return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)}; }
// r[j] becomes: lane i of quarter q holds byte 16 q + 4 j + i of each of the four.
FLASHRT_INLINE void interleave(B r[4]) {
    const __m512i a = _mm512_unpacklo_epi8(r[0].v, r[1].v), b = _mm512_unpackhi_epi8(r[0].v, r[1].v);
    const __m512i c = _mm512_unpacklo_epi8(r[2].v, r[3].v), d = _mm512_unpackhi_epi8(r[2].v, r[3].v);
    r[0] = {_mm512_unpacklo_epi16(a, c)};
    r[1] = {_mm512_unpackhi_epi16(a, c)};
    r[2] = {_mm512_unpacklo_epi16(b, d)};
    r[3] = {_mm512_unpackhi_epi16(b, d)};
}

// Lanes 0 to 7 and 8 to 15.
FLASHRT_INLINE F pair(float a, float b) { return {_mm512_insertf32x8(_mm512_set1_ps(a), _mm256_set1_ps(b), 1)}; }
FLASHRT_INLINE I load_i(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
FLASHRT_INLINE I sub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FLASHRT_INLINE B load_halves(const void* p, const void* q) {  // 32 bytes of each
    const __m256i a = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return {_mm512_inserti64x4(_mm512_castsi256_si512(a), _mm256_loadu_si256(static_cast<const __m256i*>(q)), 1)};
}
// 32 bytes, shifted down by `low` and by `high` bits; bits of their neighbours come in.
FLASHRT_INLINE B shifted_halves(const void* p, int low, int high) {
    const __m256i a = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return {_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_srl_epi16(a, _mm_cvtsi32_si128(low))),
                               _mm256_srl_epi16(a, _mm_cvtsi32_si128(high)), 1)};
}
FLASHRT_INLINE B bytes_and(B a, int8_t mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(mask))}; }
FLASHRT_INLINE B bytes_or(B a, B b) { return {_mm512_or_si512(a.v, b.v)}; }
FLASHRT_INLINE B shift_up(B a, int bits) { return {_mm512_sll_epi16(a.v, _mm_cvtsi32_si128(bits))}; }
FLASHRT_INLINE B nibbles32(const void* p) { return bytes_and(shifted_halves(p, 0, 4), 15); }
// The low halves of 16 bytes, then the high ones, then those of 16 others.
FLASHRT_INLINE B nibbles16(const void* p, const void* q) {
    const __m128i a = _mm_loadu_si128(static_cast<const __m128i*>(p)), b = _mm_loadu_si128(static_cast<const __m128i*>(q));
    const __m256i first = _mm256_inserti128_si256(_mm256_castsi128_si256(a), _mm_srli_epi16(a, 4), 1);
    const __m256i second = _mm256_inserti128_si256(_mm256_castsi128_si256(b), _mm_srli_epi16(b, 4), 1);
    return bytes_and({_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1)}, 15);
}
FLASHRT_INLINE B bits_as_bytes(uint64_t bits, int8_t value) { return {_mm512_maskz_set1_epi8(bits, value)}; }
FLASHRT_INLINE B look_up_bytes(B codes, const int8_t* table) {
    const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), codes.v)};
}
// The products of four signed a and b; -128 only in a.
FLASHRT_INLINE I dot_signed(B a, B b) {
    const __m512i signs = _mm512_mask_sub_epi8(b.v, _mm512_movepi8_mask(a.v), _mm512_setzero_si512(), b.v);
    return {_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_abs_epi8(a.v), signs)};
}
// Of four a of up to 63 and 256 coarse + fine.
FLASHRT_INLINE I dot_fine(B a, B coarse, B fine) {
    const __m512i zeros = _mm512_setzero_si512();
    return {_mm512_dpbusd_epi32(_mm512_slli_epi32(_mm512_dpbusd_epi32(zeros, a.v, coarse.v), 8), a.v, fine.v)};
}
FLASHRT_INLINE I dot_signed_fine(B a, B coarse, B fine) {
    return {_mm512_add_epi32(_mm512_slli_epi32(dot_signed(a, coarse).v, 8), dot_signed(a, fine).v)};
}
// Words of 16 bits, to multiply sums of two products with: each of two numbers in half of them, and each of four in a
// quarter. The two are there twice, as both halves of 32 bits.
FLASHRT_INLINE W pair_words(const int32_t* p) {
    return {_mm512_inserti64x4(_mm512_set1_epi32(p[0]), _mm256_set1_epi32(p[1]), 1)};
}
FLASHRT_INLINE W quad_words(const int16_t* p) {
    int64_t all;
    std::memcpy(&all, p, 8);
    const __m512i order = _mm512_set_epi64(0x0706070607060706, 0x0706070607060706, 0x0504050405040504, 0x0504050405040504,
                                           0x0302030203020302, 0x0302030203020302, 0x0100010001000100, 0x0100010001000100);
    return {_mm512_shuffle_epi8(_mm512_set1_epi64(all), order)};
}
FLASHRT_INLINE I dot_scaled(I sum, B a, B b, W scale) {  // a of up to 63
    return {_mm512_dpwssd_epi32(sum.v, _mm512_maddubs_epi16(a.v, b.v), scale.v)};
}
FLASHRT_INLINE I dot_scaled_signed(I sum, B a, B b, W scale) {
    const __m512i signs = _mm512_mask_sub_epi8(b.v, _mm512_movepi8_mask(a.v), _mm512_setzero_si512(), b.v);
    return {_mm512_dpwssd_epi32(sum.v, _mm512_maddubs_epi16(_mm512_abs_epi8(a.v), signs), scale.v)};
}

#elif defined(__AVX2__)

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct W { __m256i a, b; };
struct B { __m256i a, b; };

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
FLASHRT_INLINE F above(F x, F t) {
    return {_mm256_and_ps(x.a, _mm256_cmp_ps(x.a, t.a, _CMP_NLE_UQ)),
            _mm256_and_ps(x.b, _mm256_cmp_ps(x.b, t.b, _CMP_NLE_UQ))};
}
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
FLASHRT_INLINE __m256 add_neighbours(__m256 x, __m256 y) {
    const __m256d mixed = _mm256_castps_pd(_mm256_hadd_ps(x, y));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(mixed, 0xd8));
}
FLASHRT_INLINE F add_neighbours(F x, F y) { return {add_neighbours(x.a, x.b), add_neighbours(y.a, y.b)}; }

struct Table { float scale, minus_offset; };
FLASHRT_INLINE Table table(float scale, float minus_offset) { return {scale, minus_offset}; }
FLASHRT_INLINE F look_up(const uint8_t* p, Table t) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i mask = _mm_set1_epi8(15);
    const __m256i low = _mm256_cvtepu8_epi32(_mm_and_si128(bytes, mask));
    const __m256i high = _mm256_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask));
    return fma(splat(t.scale), {_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)}, splat(t.minus_offset));
}

FLASHRT_INLINE I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
FLASHRT_INLINE F to_float(I x) { return EACH(_mm256_cvtepi32_ps); }
FLASHRT_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FLASHRT_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
FLASHRT_INLINE W load_w(const int16_t* p) { return {load256(p), load256(p + 16)}; }
FLASHRT_INLINE W widen_i8(const int8_t* p) {
    return {_mm256_cvtepi8_epi16(load128(p)), _mm256_cvtepi8_epi16(load128(p + 16))};
}
FLASHRT_INLINE I dot(I s, W x, W y) {
    return {_mm256_add_epi32(s.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(s.b, _mm256_madd_epi16(x.b, y.b))};
}
FLASHRT_INLINE void store_i16(int16_t* to, F x) {
    const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}
FLASHRT_INLINE void store_i8(int8_t* to, F x) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i bytes = _mm256_packs_epi16(words, words);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, order)));
}

FLASHRT_INLINE void store256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
FLASHRT_INLINE void store_i(int32_t* p, I x) {
    store256(p, x.a);
    store256(p + 8, x.b);
}
FLASHRT_INLINE I nearest(F x) { return EACH(_mm256_cvtps_epi32); }
FLASHRT_INLINE I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
FLASHRT_INLINE I splat_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
template <int N> FLASHRT_INLINE I left(I x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }

FLASHRT_INLINE B load_bytes(const void* p) { return {load256(p), load256(static_cast<const char*>(p) + 32)}; }
FLASHRT_INLINE B load_bytes(const void* p, int n) {
    alignas(32) char part[64] = {};
    std::memcpy(part, p, n);
    return load_bytes(part);
}
FLASHRT_INLINE void store_bytes(void* p, B x) {
    store256(p, x.a);
    store256(static_cast<char*>(p) + 32, x.b);
}
FLASHRT_INLINE B low_nibbles(B x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
FLASHRT_INLINE B high_nibbles(B x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask)};
}
template <int N> FLASHRT_INLINE B two_bits(B x) {  // moved down, as products are summed in 16 bits
    const __m256i mask = _mm256_set1_epi8(3);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, N), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, N), mask)};
}
FLASHRT_INLINE void settle(I*) {}
FLASHRT_INLINE B splat_quad(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
FLASHRT_INLINE void transpose_quarters(B r[4]) {
    const B from[4] = {r[0], r[1], r[2], r[3]};
    auto join = [](__m256i x, __m256i y, bool high) FLASHRT_LAMBDA {
        return high ? _mm256_permute2x128_si256(x, y, 0x31) : _mm256_permute2x128_si256(x, y, 0x20);
    };
    for (int i = 0; i < 2; ++i) {
        r[i] = {join(from[0].a, from[1].a, i), join(from[2].a, from[3].a, i)};
        r[2 + i] = {join(from[0].b, from[1].b, i), join(from[2].b, from[3].b, i)};
    }
}
FLASHRT_INLINE void split_words(__m256i m0, __m256i m1, __m256i m2, __m256i m3, __m256i& coarse, __m256i& fine) {
    const __m256i half = _mm256_set1_epi16(128);
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 8, 2, 10, 4, 12, 6, 14, 1, 9, 3, 11, 5, 13, 7, 15));
    const __m256i a = _mm256_shuffle_epi8(_mm256_add_epi16(_mm256_packs_epi32(m0, m1), half), order);
    const __m256i b = _mm256_shuffle_epi8(_mm256_add_epi16(_mm256_packs_epi32(m2, m3), half), order);
    fine = _mm256_xor_si256(_mm256_unpacklo_epi16(a, b), _mm256_set1_epi8(-128));
    coarse = _mm256_unpackhi_epi16(a, b);
}
FLASHRT_INLINE void split_words(const I m[4], I& coarse, I& fine) {
    split_words(m[0].a, m[1].a, m[2].a, m[3].a, coarse.a, fine.a);
    split_words(m[0].b, m[1].b, m[2].b, m[3].b, coarse.b, fine.b);
}
FLASHRT_INLINE F load_doubled_u8(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i both = _mm_unpacklo_epi8(bytes, bytes);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(both)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(both, both)))};
}
FLASHRT_INLINE B quarters(const void* p, int odd) {
    const __m256i all = load256(p), i = _mm256_set1_epi32(odd);
    const __m256i low = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2), high = _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6);
    return {_mm256_permutevar8x32_epi32(all, _mm256_add_epi32(low, i)),
            _mm256_permutevar8x32_epi32(all, _mm256_add_epi32(high, i))};
}
FLASHRT_INLINE B quarters(const int32_t* p, int odd) { return quarters(static_cast<const void*>(p), odd); }
FLASHRT_INLINE F quarters(const float* p, int odd) {
    const B b = quarters(static_cast<const void*>(p), odd);
    return {_mm256_castsi256_ps(b.a), _mm256_castsi256_ps(b.b)};
}
FLASHRT_INLINE I dot(I s, B x, B y) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(s.a, _mm256_madd_epi16(_mm256_maddubs_epi16(x.a, y.a), ones)),
            _mm256_add_epi32(s.b, _mm256_madd_epi16(_mm256_maddubs_epi16(x.b, y.b), ones))};
}
FLASHRT_INLINE void interleave256(__m256i& r0, __m256i& r1, __m256i& r2, __m256i& r3) {
    const __m256i a = _mm256_unpacklo_epi8(r0, r1), b = _mm256_unpackhi_epi8(r0, r1);
    const __m256i c = _mm256_unpacklo_epi8(r2, r3), d = _mm256_unpackhi_epi8(r2, r3);
    r0 = _mm256_unpacklo_epi16(a, c);
    r1 = _mm256_unpackhi_epi16(a, c);
    r2 = _mm256_unpacklo_epi16(b, d);
    r3 = _mm256_unpackhi_epi16(b, d);
}
FLASHRT_INLINE void interleave(B r[4]) {
    interleave256(r[0].a, r[1].a, r[2].a, r[3].a);
    interleave256(r[0].b, r[1].b, r[2].b, r[3].b);
}
FLASHRT_INLINE F pair(float s, float t) { return {_mm256_set1_ps(s), _mm256_set1_ps(t)}; }
FLASHRT_INLINE I load_i(const int32_t* p) { return {load256(p), load256(p + 8)}; }
FLASHRT_INLINE I sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
FLASHRT_INLINE B load_halves(const void* p, const void* q) { return {load256(p), load256(q)}; }
FLASHRT_INLINE B shifted_halves(const void* p, int low, int high) {
    const __m256i x = load256(p);
    return {_mm256_srl_epi16(x, _mm_cvtsi32_si128(low)), _mm256_srl_epi16(x, _mm_cvtsi32_si128(high))};
}
FLASHRT_INLINE B bytes_and(B x, int8_t mask) {
    return {_mm256_and_si256(x.a, _mm256_set1_epi8(mask)), _mm256_and_si256(x.b, _mm256_set1_epi8(mask))};
}
FLASHRT_INLINE B bytes_or(B x, B y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
FLASHRT_INLINE B shift_up(B x, int bits) {
    return {_mm256_sll_epi16(x.a, _mm_cvtsi32_si128(bits)), _mm256_sll_epi16(x.b, _mm_cvtsi32_si128(bits))};
}
FLASHRT_INLINE B nibbles32(const void* p) { return bytes_and(shifted_halves(p, 0, 4), 15); }
FLASHRT_INLINE B nibbles16(const void* p, const void* q) {
    const __m128i x = load128(p), y = load128(q);
    return bytes_and({_mm256_set_m128i(_mm_srli_epi16(x, 4), x), _mm256_set_m128i(_mm_srli_epi16(y, 4), y)}, 15);
}
FLASHRT_INLINE __m256i bits_as_bytes(uint32_t bits, int8_t value) {
    const __m256i places = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3,
                                            3, 3, 3, 3, 3);
    const __m256i each = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), places), each);
    return _mm256_and_si256(_mm256_cmpeq_epi8(own, each), _mm256_set1_epi8(value));
}
FLASHRT_INLINE B bits_as_bytes(uint64_t bits, int8_t value) {
    return {bits_as_bytes(static_cast<uint32_t>(bits), value), bits_as_bytes(static_cast<uint32_t>(bits >> 32), value)};
}
FLASHRT_INLINE B look_up_bytes(B codes, const int8_t* table) {
    const __m256i values = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(values, codes.a), _mm256_shuffle_epi8(values, codes.b)};
}
FLASHRT_INLINE __m256i dot_signed(__m256i x, __m256i y) {  // sums of two, in 16 bits
    return _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(y, x));
}
FLASHRT_INLINE I dot_signed(B x, B y) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(dot_signed(x.a, y.a), ones), _mm256_madd_epi16(dot_signed(x.b, y.b), ones)};
}
FLASHRT_INLINE __m256i join_fine(__m256i coarse, __m256i fine) {  // sums of two, in 16 bits
    return _mm256_add_epi32(_mm256_madd_epi16(coarse, _mm256_set1_epi16(256)),
                            _mm256_madd_epi16(fine, _mm256_set1_epi16(1)));
}
FLASHRT_INLINE I dot_fine(B x, B coarse, B fine) {
    return {join_fine(_mm256_maddubs_epi16(x.a, coarse.a), _mm256_maddubs_epi16(x.a, fine.a)),
            join_fine(_mm256_maddubs_epi16(x.b, coarse.b), _mm256_maddubs_epi16(x.b, fine.b))};
}
FLASHRT_INLINE I dot_signed_fine(B x, B coarse, B fine) {
    return {join_fine(dot_signed(x.a, coarse.a), dot_signed(x.a, fine.a)),
            join_fine(dot_signed(x.b, coarse.b), dot_signed(x.b, fine.b))};
}
FLASHRT_INLINE W pair_words(const int32_t* p) { return {_mm256_set1_epi32(p[0]), _mm256_set1_epi32(p[1])}; }
FLASHRT_INLINE W quad_words(const int16_t* p) {
    int64_t all;
    std::memcpy(&all, p, 8);
    const __m256i x = _mm256_set1_epi64x(all);
    return {_mm256_shuffle_epi8(x, _mm256_set_epi64x(0x0302030203020302, 0x0302030203020302, 0x0100010001000100,
                                                     0x0100010001000100)),
            _mm256_shuffle_epi8(x, _mm256_set_epi64x(0x0706070607060706, 0x0706070607060706, 0x0504050405040504,
                                                     0x0504050405040504))};
}
FLASHRT_INLINE I dot_scaled(I sum, B x, B y, W scale) {
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(_mm256_maddubs_epi16(x.a, y.a), scale.a)),
            _mm256_add_epi32(sum.b, _mm256_madd_epi16(_mm256_maddubs_epi16(x.b, y.b), scale.b))};
}
FLASHRT_INLINE I dot_scaled_signed(I sum, B x, B y, W scale) {
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(dot_signed(x.a, y.a), scale.a)),
            _mm256_add_epi32(sum.b, _mm256_madd_epi16(dot_signed(x.b, y.b), scale.b))};
}
// Two sums at once, in the order of `sum`.
FLASHRT_INLINE void sum_two(const F* x, float* out) {
    const __m256 p = _mm256_add_ps(x[0].a, x[0].b), q = _mm256_add_ps(x[1].a, x[1].b);
    __m256 v = _mm256_add_ps(_mm256_permute2f128_ps(p, q, 0x20), _mm256_permute2f128_ps(p, q, 0x31));
    v = _mm256_add_ps(v, _mm256_permute_ps(v, 0xee));
    v = _mm256_add_ps(v, _mm256_permute_ps(v, 0xf5));
    out[0] = _mm256_cvtss_f32(v);
    out[1] = _mm_cvtss_f32(_mm256_extractf128_ps(v, 1));
}
#undef EACH

#else

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct W { int16_t v[32]; };
struct B { uint8_t v[64]; };

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
FLASHRT_INLINE F above(F a, F t) { LANES(a.v[i] <= t.v[i] ? 0.0f : a.v[i]); }
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
FLASHRT_INLINE F add_neighbours(F a, F b) {
    F r;
    for (int i = 0; i < 8; ++i) {
        r.v[i] = a.v[2 * i] + a.v[2 * i + 1];
        r.v[8 + i] = b.v[2 * i] + b.v[2 * i + 1];
    }
    return r;
}

struct Table { float scale, minus_offset; };
FLASHRT_INLINE Table table(float scale, float minus_offset) { return {scale, minus_offset}; }
FLASHRT_INLINE F look_up(const uint8_t* p, Table t) {
    F codes;
    for (int i = 0; i < 8; ++i) {
        codes.v[i] = static_cast<float>(p[i] & 15);
        codes.v[8 + i] = static_cast<float>(p[i] >> 4);
    }
    return fma(splat(t.scale), codes, splat(t.minus_offset));
}

FLASHRT_INLINE I zero_i() { return I{}; }
FLASHRT_INLINE F to_float(I a) { LANES(static_cast<float>(a.v[i])); }
#undef LANES
#define LANES(expression)                              \
    W r;                                               \
    for (int i = 0; i < 32; ++i) r.v[i] = expression;  \
    return r
FLASHRT_INLINE W load_w(const int16_t* p) { LANES(p[i]); }
FLASHRT_INLINE W widen_i8(const int8_t* p) { LANES(p[i]); }
#undef LANES
FLASHRT_INLINE I dot(I s, W a, W b) {
    for (int i = 0; i < 16; ++i)
        s.v[i] += static_cast<int32_t>(a.v[2 * i]) * b.v[2 * i] + static_cast<int32_t>(a.v[2 * i + 1]) * b.v[2 * i + 1];
    return s;
}
FLASHRT_INLINE void store_i16(int16_t* to, F a) {
    a = round(a);
    for (int i = 0; i < 16; ++i) {
        const float c = a.v[i] < -32768.0f ? -32768.0f : a.v[i] > 32767.0f ? 32767.0f : a.v[i];
        to[i] = static_cast<int16_t>(c);
    }
}
FLASHRT_INLINE void store_i8(int8_t* to, F a) {
    a = round(a);
    for (int i = 0; i < 16; ++i) {
        const float c = a.v[i] < -128.0f ? -128.0f : a.v[i] > 127.0f ? 127.0f : a.v[i];
        to[i] = static_cast<int8_t>(c);
    }
}

#define LANES(expression)                              \
    I r;                                               \
    for (int i = 0; i < 16; ++i) r.v[i] = expression;  \
    return r
FLASHRT_INLINE void store_i(int32_t* p, I a) { std::memcpy(p, a.v, sizeof a.v); }
FLASHRT_INLINE I nearest(F a) {
    a = round(a);
    LANES(static_cast<int32_t>(a.v[i]));
}
FLASHRT_INLINE I add(I a, I b) { LANES(a.v[i] + b.v[i]); }
FLASHRT_INLINE I splat_i(int32_t a) { LANES(a); }
template <int N> FLASHRT_INLINE I left(I a) { LANES(static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N)); }
FLASHRT_INLINE I dot(I s, B a, B b) {
    for (int i = 0; i < 64; ++i) s.v[i / 4] += a.v[i] * static_cast<int8_t>(b.v[i]);
    return s;
}
#undef LANES
#define LANES(expression)                              \
    B r;                                               \
    for (int i = 0; i < 64; ++i) r.v[i] = expression;  \
    return r
FLASHRT_INLINE B load_bytes(const void* p) { LANES(static_cast<const uint8_t*>(p)[i]); }
FLASHRT_INLINE B load_bytes(const void* p, int n) { LANES(i < n ? static_cast<const uint8_t*>(p)[i] : 0); }
FLASHRT_INLINE void store_bytes(void* p, B a) { std::memcpy(p, a.v, sizeof a.v); }
FLASHRT_INLINE B low_nibbles(B a) { LANES(a.v[i] & 15); }
FLASHRT_INLINE B high_nibbles(B a) { LANES(a.v[i] >> 4); }
template <int N> FLASHRT_INLINE B two_bits(B a) { LANES(a.v[i] >> N & 3); }
FLASHRT_INLINE void settle(I*) {}
FLASHRT_INLINE B splat_quad(int32_t a) {
    B r;
    for (int i = 0; i < 64; i += 4) std::memcpy(r.v + i, &a, 4);
    return r;
}
FLASHRT_INLINE void transpose_quarters(B r[4]) {
    const B from[4] = {r[0], r[1], r[2], r[3]};
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) std::memcpy(r[i].v + 16 * j, from[j].v + 16 * i, 16);
}
FLASHRT_INLINE void split_words(const I m[4], I& coarse, I& fine) {
    for (int i = 0; i < 16; ++i) {
        int8_t high[4], low[4];
        for (int j = 0; j < 4; ++j) {
            high[j] = static_cast<int8_t>((m[j].v[i] + 128) >> 8);
            low[j] = static_cast<int8_t>(m[j].v[i] - 256 * high[j]);
        }
        std::memcpy(coarse.v + i, high, 4);
        std::memcpy(fine.v + i, low, 4);
    }
}
#undef LANES
FLASHRT_INLINE F load_doubled_u8(const uint8_t* p) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(p[i / 2]);
    return r;
}
FLASHRT_INLINE B quarters(const int32_t* p, int odd) {
    B r;
    for (int i = 0; i < 16; ++i) std::memcpy(r.v + 4 * i, p + i / 4 * 2 + odd, 4);
    return r;
}
FLASHRT_INLINE F quarters(const float* p, int odd) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i / 4 * 2 + odd];
    return r;
}
FLASHRT_INLINE void interleave(B r[4]) {
    const B from[4] = {r[0], r[1], r[2], r[3]};
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 64; ++i) r[j].v[i] = from[i % 4].v[i / 16 * 16 + 4 * j + i % 16 / 4];
}

FLASHRT_INLINE F pair(float a, float b) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = i < 8 ? a : b;
    return r;
}
FLASHRT_INLINE I load_i(const int32_t* p) {
    I r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
FLASHRT_INLINE I sub(I a, I b) {
    for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
    return a;
}
#define LANES(expression)                              \
    B r;                                               \
    for (int i = 0; i < 64; ++i) r.v[i] = static_cast<uint8_t>(expression);  \
    return r
FLASHRT_INLINE B load_halves(const void* p, const void* q) {
    LANES(static_cast<const uint8_t*>(i < 32 ? p : q)[i % 32]);
}
FLASHRT_INLINE B shifted_halves(const void* p, int low, int high) {
    LANES(static_cast<const uint8_t*>(p)[i % 32] >> (i < 32 ? low : high));
}
FLASHRT_INLINE B bytes_and(B a, int8_t mask) { LANES(a.v[i] & mask); }
FLASHRT_INLINE B bytes_or(B a, B b) { LANES(a.v[i] | b.v[i]); }
FLASHRT_INLINE B shift_up(B a, int bits) { LANES(a.v[i] << bits); }
FLASHRT_INLINE B nibbles32(const void* p) { return bytes_and(shifted_halves(p, 0, 4), 15); }
FLASHRT_INLINE B nibbles16(const void* p, const void* q) {
    LANES(static_cast<const uint8_t*>(i < 32 ? p : q)[i % 16] >> (i % 32 < 16 ? 0 : 4) & 15);
}
FLASHRT_INLINE B bits_as_bytes(uint64_t bits, int8_t value) { LANES(bits >> i & 1 ? value : 0); }
FLASHRT_INLINE B look_up_bytes(B codes, const int8_t* table) { LANES(table[codes.v[i]]); }
#undef LANES
FLASHRT_INLINE I dot_signed(B a, B b) {
    I r{};
    for (int i = 0; i < 64; ++i) r.v[i / 4] += static_cast<int8_t>(a.v[i]) * static_cast<int8_t>(b.v[i]);
    return r;
}
FLASHRT_INLINE I dot_fine(B a, B coarse, B fine) {
    return add(left<8>(dot(zero_i(), a, coarse)), dot(zero_i(), a, fine));
}
FLASHRT_INLINE I dot_signed_fine(B a, B coarse, B fine) {
    return add(left<8>(dot_signed(a, coarse)), dot_signed(a, fine));
}
FLASHRT_INLINE W pair_words(const int32_t* p) {
    W r;
    for (int i = 0; i < 32; ++i) r.v[i] = static_cast<int16_t>(p[i / 16]);
    return r;
}
FLASHRT_INLINE W quad_words(const int16_t* p) {
    W r;
    for (int i = 0; i < 32; ++i) r.v[i] = p[i / 8];
    return r;
}
FLASHRT_INLINE I dot_scaled(I sum, B a, B b, W scale) {
    for (int i = 0; i < 64; ++i) sum.v[i / 4] += a.v[i] * static_cast<int8_t>(b.v[i]) * scale.v[i / 2];
    return sum;
}
FLASHRT_INLINE I dot_scaled_signed(I sum, B a, B b, W scale) {
    for (int i = 0; i < 64; ++i)
        sum.v[i / 4] += static_cast<int8_t>(a.v[i]) * static_cast<int8_t>(b.v[i]) * scale.v[i / 2];
    return sum;
}

#endif

FLASHRT_INLINE F zero() { return splat(0.0f); }

#if !defined(__AVX512F__)
FLASHRT_INLINE B hold(B a) { return a; }
template <int N>
FLASHRT_INLINE void sum_each(const F* a, float* out) {
    int i = 0;
#if defined(__AVX2__)
    for (; i + 2 <= N; i += 2) sum_two(a + i, out + i);
#endif
    for (; i < N; ++i) out[i] = sum(a[i]);
}
#endif

// Eight bytes, each as both halves of 32 bits.
FLASHRT_INLINE void double_words(const uint8_t* p, int32_t* to) {
#if defined(__AVX2__)
    const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_or_si256(x, _mm256_slli_epi32(x, 16)));
#else
    for (int i = 0; i < 8; ++i) to[i] = p[i] * 0x10001;
#endif
}

FLASHRT_INLINE float from_half(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) {
        const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -small : small;
    }
    const uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
#endif
}

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

// Into the second-level cache: it has room for far more misses in flight than the first, which decides the rate of
// reading memory (9 against 22 GB/s on one core of a Zen 4).
FLASHRT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

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

// 2^r for |r| <= 1/2, to 3e-7 of it.
FLASHRT_INLINE F exp2_fraction(F r) {
    F p = splat(1.32764713e-3f);
    p = fma(p, r, splat(9.67554096e-3f));
    p = fma(p, r, splat(5.55071309e-2f));
    p = fma(p, r, splat(2.40221202e-1f));
    p = fma(p, r, splat(6.93146944e-1f));
    return fma(p, r, splat(1.0f));
}

FLASHRT_INLINE F sigmoid(F x) { return div(splat(1.0f), add(splat(1.0f), exp(sub(zero(), x)))); }
FLASHRT_INLINE F tanh(F x) {  // 2 sigmoid(2x) - 1: absolute error about 1e-7, which is what gelu and softcap need
    return fma(splat(2.0f), sigmoid(add(x, x)), splat(-1.0f));
}

}  // namespace flashrt::FLASHRT_ISA
