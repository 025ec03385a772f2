// y += h * row for int4 rows: the down projection, 32 neurons at a time.
//
// The factors h * scale of 32 neurons are rounded, per group of columns, to 16 bits relative to the largest, and split
// into two signed bytes each. The codes of four neurons at a time are interleaved byte by byte, so that integer
// products sum them exactly; only the sum over blocks of 32 neurons rounds. The sums are kept in the order in which the
// interleaved codes come, which `collect_int4` puts right.
#pragma once

#include "rows.h"

namespace flashrt::FLASHRT_ISA {

constexpr int NEURONS = GATHER;
constexpr int QUADS = NEURONS / 4;

struct Int4Factors {  // of one token and 32 neurons, for 16 groups
    int32_t coarse[QUADS][16], fine[QUADS][16];  // four signed bytes: h * scale = step * (256 * coarse + fine)
    float step[16], offset[16];                  // offset: the sum over neurons of h * offset
};

// The factors of groups [g, g + 16).
inline void fill_factors(const uint8_t* const* rows, int count, int kp, int g, const float* h, Int4Factors& f) {
    constexpr float LEVELS = 127 * 256;
    const int groups = kp / INT4_GROUP - g;
    F factors[NEURONS], most = zero(), offset = zero();
    for (int i = 0; i < count; ++i) {
        const Int4Row row(rows[i], kp);
        factors[i] = mul(load_codes(row.a + g, groups), splat(h[i] * row.u));
        most = max(most, abs(factors[i]));
        offset = fma(load_codes(row.b + g, groups), splat(h[i] * row.v), offset);
    }
    for (int i = count; i < NEURONS; ++i) factors[i] = zero();
    const F safe = max(most, splat(1e-30f));
    const F inverse = div(splat(LEVELS), safe);
    for (int quad = 0; quad < QUADS; ++quad) {
        I coarse[4], fine[4];
        for (int j = 0; j < 4; ++j) {
            const I m = nearest(mul(factors[4 * quad + j], inverse));
            coarse[j] = bits_and(right<8>(add(m, splat_i(128))), splat_i(255));
            fine[j] = bits_and(m, splat_i(255));  // as a signed byte: m minus 256 times the coarse one
        }
        auto join = [](const I b[4]) FLASHRT_LAMBDA {
            return bits_or(bits_or(b[0], left<8>(b[1])), bits_or(left<16>(b[2]), left<24>(b[3])));
        };
        store_i(f.coarse[quad], join(coarse));
        store_i(f.fine[quad], join(fine));
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

// y[0..127] += half a span of every row, times its factor; `g` is the span's first group in the factors.
template <typename Codes>
FLASHRT_INLINE void add_half(const Int4Factors& f, int g, Codes&& codes, float* y) {
    I coarse[8], fine[8];
    for (int j = 0; j < 8; ++j) coarse[j] = fine[j] = zero_i();
    for (int quad = 0; quad < QUADS; ++quad) {
        B c[8];
        codes(quad, c);
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
            const F total = to_float(add(left<8>(coarse[j]), fine[j]));  // below 2^24: exact
            store(y + 16 * j, sub(fma(total, step, load(y + 16 * j)), offset));
        }
    }
}

// Prefetches what some rows hold after their codes: with each span, a share of the rows.
FLASHRT_INLINE void fetch_scales(const uint8_t* const* rows, int kp, int g) {
    const int groups = kp / INT4_GROUP, then = g + INT4_SPAN < groups ? g + INT4_SPAN : groups;
    for (int i = NEURONS * g / groups; i < NEURONS * then / groups; ++i)
        for (int line = 0; line < 2 * groups + 8; line += 64) prefetch(rows[i] + kp / 2 + line);
}

// y[t * y_step + ...] += h[t * h_step + i] * row i, in the interleaved order. There are 32 rows to read; those from
// `count` on have factors of 0.
inline void axpys_int4(const uint8_t* const* row, const uint8_t* const* next, int count, int k, const float* h,
                       size_t h_step, int tokens, float* y, size_t y_step) {
    const int kp = padded(k), groups = kp / INT4_GROUP;
    Int4Factors factors[16];
    for (int g = 0; g < groups; g += INT4_SPAN) {
        if (g % 16 == 0)
            for (int t = 0; t < tokens; ++t) fill_factors(row, count, kp, g, h + t * h_step, factors[t]);
        const int half = 8 * span_groups(groups, g);
        fetch_scales(next, kp, g);
        for (int z = 0; z < 2; ++z) {
            const size_t at = 16 * static_cast<size_t>(g) + z * half;
            float* to = y + INT4_GROUP * g + z * SPAN / 2;
            if (tokens == 1) {
                add_half(factors[0], g % 16, [&](int quad, B* c) FLASHRT_LAMBDA {
                    for (int i = 4 * quad; i < 4 * quad + 4; ++i) prefetch(next[i] + at);
                    load_quad(row + 4 * quad, at, half, c);
                }, to);
                continue;
            }
            for (int i = 0; i < count; ++i) prefetch(next[i] + at);
            alignas(64) uint8_t block[QUADS][8][64];  // taken apart once for all tokens
            for (int quad = 0; quad < QUADS; ++quad) {
                B c[8];
                load_quad(row + 4 * quad, at, half, c);
                for (int j = 0; j < 8; ++j) store_bytes(block[quad][j], c[j]);
            }
            for (int t = 0; t < tokens; ++t)
                add_half(factors[t], g % 16,
                         [&](int quad, B* c) FLASHRT_LAMBDA {
                             for (int j = 0; j < 8; ++j) c[j] = load_bytes(block[quad][j]);
                         },
                         to + t * y_step);
        }
    }
}

// y[0..k) += sums that `axpys_int4` left in its own order.
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
