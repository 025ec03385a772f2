// Labels of keys: their codes, and what queries make of them. labels.py describes how they lie.
//
// Products of codes are added as integers, exactly. The softmax of a query is summed by chunks, each in units of a
// power of two near its best score, and chunks are brought together in order. So sums have one order, whoever computes
// a chunk, and blocks with the same labels weigh the same, wherever they lie.
#pragma once

#include "vectors.h"

namespace flashrt::FLASHRT_ISA {

inline void encode_label(const float* values, const float* low, const float* step, int channels, uint8_t* to) {
    alignas(64) int32_t codes[WIDEST_HEAD];
    const F most = splat(LABEL_CODES - 1);
    each16(channels, [&](int i, int n) {
        const F steps = n == 16 ? load(step + i) : load_part(step + i, n, 1.0f);
        const F v = div(sub(load_n(values + i, n), load_n(low + i, n)), steps);
        store_i(codes + i, nearest(min(max(v, zero()), most)));  // this order makes NaN zero
    });
    constexpr int HALF = LABEL_CHANNELS / 2;
    for (int c = 0; c < channels; c += LABEL_CHANNELS, to += LABEL_TOKENS * HALF)
        for (int j = 0; j < HALF; ++j) to[j] = static_cast<uint8_t>(codes[c + j] | codes[c + HALF + j] << 4);
}

inline float encode_query(const float* q, const float* step, int channels, int8_t* codes) {
    F most = zero();
    each16(channels, [&](int i, int n) { most = max(abs(mul(load_n(q + i, n), load_n(step + i, n))), most); });
    const float top = highest(most);
    const F inverse = splat(top > 1e-30f ? 127.0f / top : 0.0f);
    each16(channels, [&](int i, int n) {
        int8_t lanes[16];
        store_i8(lanes, mul(mul(load_n(q + i, n), load_n(step + i, n)), inverse));
        std::memcpy(codes + i, lanes, n);
    });
    return top > 1e-30f ? top / 127.0f : 0.0f;
}

constexpr int LABEL_QUERIES = 8;  // whose sums are in registers at once

// scores[q][token] of Q queries, in units of their scales, for whole groups of tokens.
template <int Q>
FLASHRT_INLINE void dot_labels(const LabelChunk& c, const int8_t* codes, float (*scores)[LABEL_CHUNK]) {
    const size_t group_bytes = static_cast<size_t>(c.channels) * LABEL_TOKENS / 2;
    for (int t = c.begin / LABEL_TOKENS * LABEL_TOKENS; t < c.end; t += LABEL_TOKENS) {
        const uint8_t* from = c.labels + t / LABEL_TOKENS * group_bytes;
        I sum[Q];
        for (int q = 0; q < Q; ++q) sum[q] = zero_i();
        for (int i = 0; i < c.channels; i += LABEL_CHANNELS, from += 64) {
            const B both = load_bytes(from), low = low_nibbles(both), high = high_nibbles(both);
            prefetch(from + 16 * group_bytes);
            for (int q = 0; q < Q; ++q) {
                int32_t quads[2];
                std::memcpy(quads, codes + q * c.channels + i, sizeof quads);
                sum[q] = dot(dot(sum[q], low, splat_quad(quads[0])), high, splat_quad(quads[1]));
            }
        }
        for (int q = 0; q < Q; ++q) store(scores[q] + t, to_float(sum[q]));
    }
}

// Sums of `width` neighbours of LABEL_CHUNK numbers, which are used up.
FLASHRT_INLINE void add_blocks(float* numbers, int width, float* sums) {
    int n = LABEL_CHUNK;
    for (; width > 1; width /= 2, n /= 2)
        for (int i = 0; i < n; i += 32)
            store(numbers + i / 2, add_neighbours(load(numbers + i), load(numbers + i + 16)));
    std::memcpy(sums, numbers, 4 * static_cast<size_t>(n));
}

// a - b, where 2^(a - b) is a normal number; else about the least that has one.
FLASHRT_INLINE F less(F a, F b) { return max(sub(a, b), splat(-126.0f)); }

// Scores of query q → its best, its total and the sums of its blocks. Tokens that are no candidates become zero.
FLASHRT_INLINE void soften_labels(const LabelChunk& c, int q, float* scores) {
    const int begin = c.begin / LABEL_TOKENS * LABEL_TOKENS;
    const int end = (c.end + LABEL_TOKENS - 1) / LABEL_TOKENS * LABEL_TOKENS;
    for (int t = begin; t < c.begin; ++t) scores[t] = -__builtin_inff();
    for (int t = c.end; t < end; ++t) scores[t] = -__builtin_inff();
    F most = splat(-__builtin_inff());
    for (int t = begin; t < end; t += 16) most = max(load(scores + t), most);
    const F scale = splat(c.scales[q]), best = round(mul(splat(highest(most)), scale));
    for (int t = begin; t < end; t += 16) {
        const F x = mul(load(scores + t), scale), n = round(x);
        store(scores + t, scale2(exp2_fraction(sub(x, n)), less(n, best)));
    }
    std::memset(scores, 0, 4 * static_cast<size_t>(c.begin));
    std::memset(scores + c.end, 0, 4 * static_cast<size_t>(LABEL_CHUNK - c.end));
    const int blocks = LABEL_CHUNK / c.block;
    float* sums = c.sums + static_cast<size_t>(q) * blocks;
    add_blocks(scores, c.block, sums);
    F total = zero();
    for (int b = 0; b < blocks; b += 16) total = add(total, load(sums + b));
    store_part(c.best + q * c.step, best, 1);
    c.total[q * c.step] = sum(total);
}

template <int Q>
void score_queries(const LabelChunk& c, int first) {
    alignas(64) float scores[Q][LABEL_CHUNK];
    dot_labels<Q>(c, c.codes + static_cast<size_t>(first) * c.channels, scores);
    for (int q = 0; q < Q; ++q) soften_labels(c, first + q, scores[q]);
}

inline void score_labels(const LabelChunk& c) {
    for (int q = 0; q < c.queries; q += LABEL_QUERIES) switch (c.queries - q) {
            case 1: score_queries<1>(c, q); break;
            case 2: score_queries<2>(c, q); break;
            case 3: score_queries<3>(c, q); break;
            case 4: score_queries<4>(c, q); break;
            case 5: score_queries<5>(c, q); break;
            case 6: score_queries<6>(c, q); break;
            case 7: score_queries<7>(c, q); break;
            default: score_queries<LABEL_QUERIES>(c, q);
        }
}

// best[c] of a query becomes what its sums of chunk c are multiplied by.
FLASHRT_INLINE void share_chunks(float* best, const float* total, int chunks) {
    F most = splat(-__builtin_inff());
    each16(chunks, [&](int i, int n) { most = max(n == 16 ? load(best + i) : load_part(best + i, n, best[0]), most); });
    const F top = splat(highest(most));
    F all = zero();
    each16(chunks, [&](int i, int n) {
        const F share = scale2(splat(1.0f), less(load_n(best + i, n), top));
        all = fma(share, load_n(total + i, n), all);
        store_n(best + i, share, n);
    });
    const F whole = splat(sum(all));
    each16(chunks, [&](int i, int n) { store_n(best + i, div(load_n(best + i, n), whole), n); });
}

inline void weigh_blocks(const LabelScores& s) {
    const int blocks = LABEL_CHUNK / s.block;
    for (int q = 0; q < s.queries; ++q) share_chunks(s.best + q * s.step, s.total + q * s.step, s.chunks);
    for (int c = 0; c < s.chunks; ++c)
        for (int b = 0; b < blocks; b += 16) {
            const float* from = s.sums + static_cast<size_t>(c) * s.queries * blocks + b;
            F weight = zero();
            for (int q = 0; q < s.queries; ++q)
                weight = fma(load(from + q * blocks), splat(s.best[q * s.step + c]), weight);
            store(s.weights + static_cast<size_t>(c) * blocks + b, weight);
        }
}

}  // namespace flashrt::FLASHRT_ISA
