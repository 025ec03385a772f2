// Attention of a tile of queries over one segment of positions.
//
// Scores are chains over the head dimension, sums over positions are chains in ascending order: an invisible position
// adds exactly zero, so a query's result does not depend on which other queries share its tile.
#pragma once

#include "encode.h"
#include "encode_kv.h"

namespace flashrt::FLASHRT_ISA {

// Where a slot's key lies, and its value behind it.
template <typename T>
FLASHRT_INLINE const T* pair_at(const Segment& s, int slot) {
    if (s.pairs) return static_cast<const T*>(s.pairs[slot]);
    return reinterpret_cast<const T*>(static_cast<const char*>(s.kv) + slot * s.pair_bytes);
}

FLASHRT_INLINE void load_head(const Segment& s, int position, bool value, float* to) {  // D floats, zeros up to 16
    const bool behind = value && !s.codecs.keys_only;
    const int at = behind ? s.dim : 0;
    const Codec codec = value ? s.codecs.value : s.codecs.key;
    int d = 0;
    if (is_kept(codec)) {
        const uint8_t* from = pair_at<uint8_t>(s, position);
        decode_row(codec, from + (behind ? s.key_bytes : 0), padded(s.dim), to);
    } else if (codec == Codec::BF16) {
        const uint16_t* from = pair_at<uint16_t>(s, position) + at;
        for (; d + 16 <= s.dim; d += 16) store(to + d, load_bf16(from + d));
        if (d < s.dim) {
            uint16_t tail[16] = {};
            std::memcpy(tail, from + d, 2 * (s.dim - d));
            store(to + d, load_bf16(tail));
        }
    } else {
        const float* from = pair_at<float>(s, position) + at;
        for (; d + 16 <= s.dim; d += 16) store(to + d, load(from + d));
        if (d < s.dim) store(to + d, load_part(from + d, s.dim - d));
    }
}

// `pack_keys` for bfloat16 and whole pairs of lanes: numbers are transposed two at a time, and widened after.
inline void pack_half_keys(const Segment& s, int begin, int n16) {
    static const uint16_t nothing[WIDEST_HEAD] = {};
    alignas(64) uint32_t block[16][16];
    for (int p = 0; p < n16; p += 16) {
        const uint16_t* keys[16];
        for (int i = 0; i < 16; ++i) {
            const int position = begin + p + i;
            keys[i] = nothing;
            if (position >= s.end) continue;
            keys[i] = pair_at<uint16_t>(s, position);
            const uint16_t* ahead = pair_at<uint16_t>(s, position + POSITIONS);
            for (int d = 0; d < s.dim; d += 32) prefetch(ahead + d);
        }
        float* stripe = s.panel + static_cast<size_t>(p) * s.dim;
        for (int d = 0; d < s.dim; d += 32) {
            const void* from[16];
            for (int i = 0; i < 16; ++i) from[i] = keys[i] + d;
            transpose(from, block);
            for (int i = 0; i < 16; ++i) {
                F even, odd;
                load_pairs_bf16(block[i], even, odd);
                store(stripe + 16 * (d + 2 * i), even);
                store(stripe + 16 * (d + 2 * i + 1), odd);
            }
        }
    }
}

// [n16 / 16][D16][16]: keys from position `begin`, transposed; positions past the end are zero.
inline void pack_keys(const Segment& s, int begin, int n16) {
    if (s.codecs.key == Codec::BF16 && s.dim % 32 == 0) return pack_half_keys(s, begin, n16);
    const int dim16 = (s.dim + 15) / 16 * 16;
    alignas(64) float keys[16][WIDEST_HEAD];
    for (int p = 0; p < n16; p += 16) {
        for (int i = 0; i < 16; ++i) {
            if (begin + p + i < s.end) load_head(s, begin + p + i, false, keys[i]);
            else std::memset(keys[i], 0, 4 * static_cast<size_t>(dim16));
        }
        float* stripe = s.panel + static_cast<size_t>(p) * dim16;
        for (int d = 0; d < dim16; d += 16) {
            const void* from[16];
            for (int i = 0; i < 16; ++i) from[i] = keys[i] + d;
            transpose(from, stripe + 16 * d);
        }
    }
}

// [V16 / 16][n][16]: values from position `begin`.
inline void pack_values(const Segment& s, int begin, int n) {
    const int values16 = (s.values + 15) / 16 * 16, behind = s.codecs.keys_only ? 0 : s.dim;
    if (s.codecs.key == Codec::BF16 && s.values % 16 == 0) {
        for (int p = 0; p < n; ++p) {
            const uint16_t* from = pair_at<uint16_t>(s, begin + p) + behind;
            const uint16_t* ahead = pair_at<uint16_t>(s, begin + p + POSITIONS) + behind;
            for (int d = 0; d < s.values; d += 16) {
                prefetch(ahead + d);
                store(s.panel + (static_cast<size_t>(d) * n + 16 * p), load_bf16(from + d));
            }
        }
        return;
    }
    alignas(64) float value[WIDEST_HEAD];
    for (int p = 0; p < n; ++p) {
        load_head(s, begin + p, true, value);
        for (int d = 0; d < values16; d += 16) store(s.panel + (static_cast<size_t>(d) * n + 16 * p), load(value + d));
    }
}

template <int J>
FLASHRT_INLINE void stripes_of(int rows, const float* a, size_t a_step, const char* panel, size_t stripe, int depth,
                               float* const* c, bool accumulate) {
    switch (rows) {
        case 1: return tile_float<1, J>(a, a_step, panel, stripe, depth, c, 0, accumulate);
        case 2: return tile_float<2, J>(a, a_step, panel, stripe, depth, c, 0, accumulate);
        case 3: return tile_float<3, J>(a, a_step, panel, stripe, depth, c, 0, accumulate);
        case 4: return tile_float<4, J>(a, a_step, panel, stripe, depth, c, 0, accumulate);
        case 5: return tile_float<5, J>(a, a_step, panel, stripe, depth, c, 0, accumulate);
        default: return tile_float<6, J>(a, a_step, panel, stripe, depth, c, 0, accumulate);
    }
}

// c[queries, 16 * stripes] (+)= a · panel, in register tiles.
inline void multiply(int queries, const float* a, size_t a_step, const float* panel, size_t stripe_bytes, int stripes,
                     int depth, float* c, size_t c_step, bool accumulate) {
    constexpr int PAIR = STRIPES > 1 ? 2 : 1;
    for (int q = 0; q < queries; q += REGISTER_ROWS) {
        const int rows = queries - q < REGISTER_ROWS ? queries - q : REGISTER_ROWS;
        const float* from = a + q * a_step;
        const char* b = reinterpret_cast<const char*>(panel);
        float* to[REGISTER_ROWS];
        for (int m = 0; m < rows; ++m) to[m] = c + (q + m) * c_step;
        for (int j = 0, width; j < stripes; j += width) {
            const int left = stripes - j;
            width = left >= STRIPES ? STRIPES : left >= PAIR ? PAIR : 1;
            if (width == STRIPES) stripes_of<STRIPES>(rows, from, a_step, b, stripe_bytes, depth, to, accumulate);
            else if (width == PAIR) stripes_of<PAIR>(rows, from, a_step, b, stripe_bytes, depth, to, accumulate);
            else stripes_of<1>(rows, from, a_step, b, stripe_bytes, depth, to, accumulate);
            b += width * stripe_bytes;
            for (int m = 0; m < rows; ++m) to[m] += 16 * width;
        }
    }
}

// Calls f(lane, node) for a query's token and those of the tree that it follows, whose positions the segment has.
template <typename Fn>
FLASHRT_INLINE void each_above(const Segment& s, int query, Fn&& f) {
    const int node = s.token + query / s.group;
    for (int d = 0; d <= s.tree->depth[node]; ++d) {
        const int lane = s.start + d - s.origin;
        if (lane >= 0 && lane < s.lanes) f(lane, s.tree->above[node][d]);
    }
}

// Scores of a tree's nodes move from their slots to their positions, so that sums have the order of a plain sequence.
FLASHRT_INLINE void to_positions(const Segment& s, int query) {
    float* row = s.scores + static_cast<size_t>(query) * SCORES;
    float nodes[NARROW_TOKENS];
    std::memcpy(nodes, row + s.start - s.begin, 4 * static_cast<size_t>(s.tree->nodes));
    each_above(s, query, [&](int lane, int node) { row[lane] = nodes[node]; });
}

// And back: a node comes after those that it follows, so their values are summed in the order of positions too.
FLASHRT_INLINE void to_slots(const Segment& s, int query) {
    float* row = s.scores + static_cast<size_t>(query) * SCORES;
    float nodes[NARROW_TOKENS] = {};
    each_above(s, query, [&](int lane, int node) { nodes[node] = row[lane]; });
    std::memcpy(row + s.start - s.begin, nodes, 4 * static_cast<size_t>(s.tree->nodes));
}

// Scores → exp(score - best) in place; invisible positions become zero.
FLASHRT_INLINE void soften(const Segment& s, int query, int n16) {
    float* row = s.scores + static_cast<size_t>(query) * SCORES;
    const int low = s.first[query] - s.origin, high = s.last[query] - s.origin;  // visible, inclusive
    const float never = -__builtin_inff();
    F most = splat(never);
    for (int p = 0; p < n16; p += 16) {
        F v = load(row + p);
        if (s.softcap != 0.0f) v = mul(splat(s.softcap), tanh(div(v, splat(s.softcap))));
        if (p < low || p + 15 > high) {
            float lanes[16];
            store(lanes, v);
            for (int i = 0; i < 16; ++i)
                if (p + i < low || p + i > high) lanes[i] = never;
            v = load(lanes);
        }
        store(row + p, v);
        most = max(v, most);
    }
    const float best = highest(most);
    F total = zero();
    for (int p = 0; p < n16; p += 16) {
        F v = exp(sub(load(row + p), splat(best)));
        if (p < low || p + 15 > high) {
            float lanes[16];
            store(lanes, v);
            for (int i = 0; i < 16; ++i)
                if (p + i < low || p + i > high) lanes[i] = 0.0f;
            v = load(lanes);
        }
        store(row + p, v);
        total = add(total, v);
    }
    s.best[query] = best;
    s.total[query] = sum(total);
}

inline void attend(const Segment& s) {
    const int dim16 = (s.dim + 15) / 16 * 16, values16 = (s.values + 15) / 16 * 16, n = s.end - s.begin, n16 = (n + 15) / 16 * 16;
    for (int p = 0; p < n16; p += POSITIONS) {
        const int count = n16 - p < POSITIONS ? n16 - p : POSITIONS;
        pack_keys(s, s.begin + p, count);
        multiply(s.queries, s.q, s.dim, s.panel, 64 * static_cast<size_t>(dim16), count / 16, s.dim, s.scores + p,
                 SCORES, false);
    }
    for (int q = 0; q < s.queries; ++q) {
        if (s.tree) to_positions(s, q);
        soften(s, q, (s.lanes + 15) / 16 * 16);
        if (s.tree) to_slots(s, q);
    }
    for (int p = 0; p < n; p += POSITIONS) {
        const int count = n - p < POSITIONS ? n - p : POSITIONS;
        pack_values(s, s.begin + p, count);
        multiply(s.queries, s.scores + p, SCORES, s.panel, 64 * static_cast<size_t>(count), values16 / 16, count,
                 s.acc, values16, p > 0);
    }
}

inline void merge(int dim16, float* best, float* total, float* acc, float best2, float total2, const float* acc2) {
    const float never = -__builtin_inff();
    if (best2 == never) return;
    if (*best == never) {
        *best = best2;
        *total = total2;
        std::memcpy(acc, acc2, 4 * static_cast<size_t>(dim16));
        return;
    }
    const float top = *best > best2 ? *best : best2;
    float factors[16] = {*best - top, best2 - top};
    store(factors, exp(load(factors)));
    const F old = splat(factors[0]), fresh = splat(factors[1]);
    *total = *total * factors[0] + total2 * factors[1];
    for (int d = 0; d < dim16; d += 16) store(acc + d, fma(load(acc2 + d), fresh, mul(load(acc + d), old)));
    *best = top;
}

}  // namespace flashrt::FLASHRT_ISA
