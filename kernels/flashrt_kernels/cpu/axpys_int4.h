// y += h * row for int4 rows: the down projection, 32 neurons at a time.
//
// The factors h * scale of 32 neurons are rounded, per group of columns, to 16 bits relative to the largest, and split
// into two signed bytes each. The codes of four neurons at a time are interleaved byte by byte, so that integer
// products sum them exactly; only the sum over blocks of 32 neurons rounds. So it does not matter in which order columns
// are taken: one token takes codes as they come, and `collect_int4` puts its sums right; several share codes that are
// put in order group by group, which lets a factor be the same for a whole vector.
#pragma once

#include "rows.h"

namespace flashrt::FLASHRT_ISA {

constexpr int NEURONS = GATHER;
constexpr int QUADS = NEURONS / 4;
#if defined(__AVX512F__)
constexpr int SHARING = 4;  // tokens whose sums fit in registers beside the codes of a group
#else
constexpr int SHARING = 1;
#endif

struct Int4Factors {  // of one token and 32 neurons, for 16 groups
    int32_t coarse[QUADS][16], fine[QUADS][16];  // four signed bytes: h * scale = step * (256 * coarse + fine)
    float step[16], offset[16];                  // offset: the sum over neurons of h * offset
};

// The factors of 16 groups. `codes` gives a neuron's scale and offset codes, `unit` what they are multiplied by.
template <typename Codes>
FLASHRT_INLINE void fill_factors(int count, const float unit[2][NEURONS], const float* h, Codes&& codes,
                                 Int4Factors& f) {
    constexpr float LEVELS = 127 * 256;
    F factors[NEURONS], most = zero(), offset = zero();
    for (int i = 0; i < count; ++i) {
        F a, b;
        codes(i, a, b);
        factors[i] = mul(a, splat(h[i] * unit[0][i]));
        most = max(most, abs(factors[i]));
        offset = fma(b, splat(h[i] * unit[1][i]), offset);
    }
    for (int i = count; i < NEURONS; ++i) factors[i] = zero();
    const F safe = max(most, splat(1e-30f));
    const F inverse = div(splat(LEVELS), safe);
    for (int quad = 0; quad < QUADS; ++quad) {
        I m[4], coarse, fine;
        for (int j = 0; j < 4; ++j) m[j] = nearest(mul(factors[4 * quad + j], inverse));
        split_words(m, coarse, fine);
        store_i(f.coarse[quad], coarse);
        store_i(f.fine[quad], fine);
    }
    store(f.step, div(safe, splat(LEVELS)));
    store(f.offset, offset);
}

// Half a span of four neurons' codes, interleaved: low nibbles in the first four, high ones in the rest. Quarter q of
// vectors 0, 1, 4 and 5 holds group 2 q of the span, that of the others group 2 q + 1.
FLASHRT_INLINE void load_quad(const uint8_t* const row[4], size_t at, int half, B codes[8]) {
    for (int j = 0; j < 4; ++j) codes[j] = half == 64 ? load_bytes(row[j] + at) : load_bytes(row[j] + at, half);
    interleave(codes);
    for (int j = 0; j < 4; ++j) {
        codes[4 + j] = high_nibbles(codes[j]);
        codes[j] = low_nibbles(codes[j]);
    }
}

// y += the sum of 32 neurons' codes times their factors, less that of their offsets; 16 columns.
FLASHRT_INLINE void add_sums(I coarse, I fine, F step, F offset, float* y) {
    const F total = to_float(add(left<8>(coarse), fine));  // below 2^24: exact
    store(y, sub(fma(total, step, load(y)), offset));
}

// Prefetches what some rows hold after their codes: with each span, a share of the rows.
FLASHRT_INLINE void fetch_scales(const uint8_t* const* rows, int kp, int g) {
    const int groups = kp / INT4_GROUP, then = g + INT4_SPAN < groups ? g + INT4_SPAN : groups;
    for (int i = NEURONS * g / groups; i < NEURONS * then / groups; ++i)
        for (int line = 0; line < 2 * groups + 8; line += 64) prefetch(rows[i] + kp / 2 + line);
}

// y[0..127] += half a span of every row, times one token's factors; `g` is the span's first group in them.
FLASHRT_INLINE void add_half(const Int4Factors& f, int g, const uint8_t* const* row, const uint8_t* const* next,
                             size_t at, int half, float* y) {
    I coarse[8], fine[8];
    for (int j = 0; j < 8; ++j) coarse[j] = fine[j] = zero_i();
    for (int quad = 0; quad < QUADS; ++quad) {
        B c[8];
        for (int i = 4 * quad; i < 4 * quad + 4; ++i) prefetch(next[i] + at);
        load_quad(row + 4 * quad, at, half, c);
        for (int odd = 0; odd < 2; ++odd) {
            const B high = quarters(f.coarse[quad] + g, odd), low = quarters(f.fine[quad] + g, odd);
            for (int i = 0; i < 4; ++i) {
                const int j = 2 * odd + i + i / 2 * 2;
                coarse[j] = dot(coarse[j], c[j], high);
                fine[j] = dot(fine[j], c[j], low);
            }
        }
    }
    for (int odd = 0; odd < 2; ++odd) {
        const F step = quarters(f.step + g, odd), offset = quarters(f.offset + g, odd);
        for (int i = 0; i < 4; ++i) {
            const int j = 2 * odd + i + i / 2 * 2;
            add_sums(coarse[j], fine[j], step, offset, y + 16 * j);
        }
    }
}

// y += h * row i, of one token, in the order that `collect_int4` knows.
inline void axpys_one(const uint8_t* const* row, const uint8_t* const* next, int count, int kp,
                      const float unit[2][NEURONS], const float* h, float* y) {
    const int groups = kp / INT4_GROUP;
    Int4Factors factors;
    for (int g = 0; g < groups; g += INT4_SPAN) {
        if (g % 16 == 0)
            fill_factors(count, unit, h,
                         [&](int i, F& a, F& b) FLASHRT_LAMBDA {
                             const Int4Row r(row[i], kp);
                             a = load_codes(r.a + g, groups - g);
                             b = load_codes(r.b + g, groups - g);
                         },
                         factors);
        const int half = 8 * span_groups(groups, g);
        fetch_scales(next, kp, g);
        for (int z = 0; z < 2; ++z)
            add_half(factors, g % 16, row, next, 16 * static_cast<size_t>(g) + z * half, half,
                     y + INT4_GROUP * g + z * SPAN / 2);
    }
}

// The codes of a span of 32 neurons, taken apart once for all tokens: 16 columns of a group and four neurons a vector.
struct Int4Block {
    alignas(64) uint8_t codes[INT4_SPAN][QUADS][2][64];

    Int4Block(const uint8_t* const* row, const uint8_t* const* next, size_t at, int half) {
        for (int z = 0; z < 2; ++z)
            for (int quad = 0; quad < QUADS; ++quad) {
                B c[8];
                for (int i = 4 * quad; i < 4 * quad + 4; ++i) prefetch(next[i] + at + z * half);
                load_quad(row + 4 * quad, at + z * half, half, c);
                for (int odd = 0; odd < 2; ++odd) {
                    B of[4] = {c[2 * odd], c[2 * odd + 1], c[2 * odd + 4], c[2 * odd + 5]};
                    transpose_quarters(of);
                    for (int i = 0; i < 4; ++i) store_bytes(codes[2 * i + odd][quad][z], of[i]);
                }
            }
    }
};

// y[t * y_step + ...] += a group of every row, times the factors of T tokens; it is group `g` in them.
template <int T>
FLASHRT_INLINE void add_group(const Int4Factors* f, int g, const uint8_t codes[QUADS][2][64], float* y, size_t y_step) {
    I coarse[T][2], fine[T][2];
    for (int t = 0; t < T; ++t)
        for (int z = 0; z < 2; ++z) coarse[t][z] = fine[t][z] = zero_i();
    for (int quad = 0; quad < QUADS; ++quad) {
        const B c[2] = {hold(load_bytes(codes[quad][0])), hold(load_bytes(codes[quad][1]))};
        for (int t = 0; t < T; ++t) {
            const B high = hold(splat_quad(f[t].coarse[quad][g])), low = hold(splat_quad(f[t].fine[quad][g]));
            for (int z = 0; z < 2; ++z) {
                coarse[t][z] = dot(coarse[t][z], c[z], high);
                fine[t][z] = dot(fine[t][z], c[z], low);
            }
        }
    }
    for (int t = 0; t < T; ++t)
        for (int z = 0; z < 2; ++z)
            add_sums(coarse[t][z], fine[t][z], splat(f[t].step[g]), splat(f[t].offset[g]), y + t * y_step + 16 * z);
}

// y[t * y_step + ...] += h[t * h_step + i] * row i, of several tokens, column by column.
inline void axpys_several(const uint8_t* const* row, const uint8_t* const* next, int count, int kp,
                          const float unit[2][NEURONS], const float* h, size_t h_step, int tokens, float* y,
                          size_t y_step) {
    const int groups = kp / INT4_GROUP;
    Int4Factors factors[NARROW_TOKENS];
    for (int g = 0; g < groups; g += INT4_SPAN) {
        if (g % 16 == 0) {
            F a[NEURONS], b[NEURONS];
            for (int i = 0; i < count; ++i) {
                const Int4Row r(row[i], kp);
                a[i] = load_codes(r.a + g, groups - g);
                b[i] = load_codes(r.b + g, groups - g);
            }
            for (int t = 0; t < tokens; ++t)
                fill_factors(count, unit, h + t * h_step,
                             [&](int i, F& scale, F& offset) FLASHRT_LAMBDA {
                                 scale = a[i];
                                 offset = b[i];
                             },
                             factors[t]);
        }
        const int in_span = span_groups(groups, g);
        fetch_scales(next, kp, g);
        const Int4Block block(row, next, 16 * static_cast<size_t>(g), 8 * in_span);
        int t = 0;
        for (; t + SHARING <= tokens; t += SHARING)
            for (int j = 0; j < in_span; ++j)
                add_group<SHARING>(factors + t, g % 16 + j, block.codes[j], y + t * y_step + INT4_GROUP * (g + j), y_step);
        for (; t < tokens; ++t)
            for (int j = 0; j < in_span; ++j)
                add_group<1>(factors + t, g % 16 + j, block.codes[j], y + t * y_step + INT4_GROUP * (g + j), y_step);
    }
}

// y[t * y_step + ...] += h[t * h_step + i] * row i. There are 32 rows to read; those from `count` on have factors of 0.
inline void axpys_int4(const uint8_t* const* row, const uint8_t* const* next, int count, int k, const float* h,
                       size_t h_step, int tokens, float* y, size_t y_step) {
    const int kp = padded(k);
    float unit[2][NEURONS];
    for (int i = 0; i < count; ++i) {
        const Int4Row r(row[i], kp);
        unit[0][i] = r.u;
        unit[1][i] = r.v;
    }
    if (tokens == 1) axpys_one(row, next, count, kp, unit, h, y);
    else axpys_several(row, next, count, kp, unit, h, h_step, tokens, y, y_step);
}

// y[0..k) += sums that `axpys_one` left in its own order.
inline void collect_int4(const float* sums, int k, float* y) {
    for (int group = 0; group * INT4_GROUP < k; ++group) {
        const int place = group % INT4_SPAN;
        const float* from = sums + SPAN * (group / INT4_SPAN) + 32 * (place % 2) + 4 * (place / 2);
        float values[INT4_GROUP];
        for (int i = 0; i < 8; ++i) {  // four weights each: half, nibble and word of the group
            const int half = i / 4, nibble = i / 2 % 2, word = i % 2;
            std::memcpy(values + 4 * i, from + SPAN / 2 * half + 64 * nibble + 16 * word, 16);
        }
        float* to = y + INT4_GROUP * group;
        const int left = k - INT4_GROUP * group;
        if (left >= INT4_GROUP)
            for (int j = 0; j < INT4_GROUP; j += 16) store(to + j, add(load(to + j), load(values + j)));
        else
            for (int i = 0; i < left; ++i) to[i] += values[i];
    }
}

}  // namespace flashrt::FLASHRT_ISA
