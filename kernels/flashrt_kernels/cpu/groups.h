// Groups of 32 weights side by side, one in each lane of a vector.
#pragma once

#include "rows.h"

namespace flashrt::FLASHRT_ISA {

// L holds a float for each of LANES groups, M a truth. AVX2 has too few registers for 16 lanes at a time.
#if defined(__AVX512F__)

using L = F;
struct M { __mmask16 v; };
FLASHRT_INLINE L read_lanes(const float* p) { return load(p); }
FLASHRT_INLINE L all(float a) { return splat(a); }
FLASHRT_INLINE L trunc(L a) { return {_mm512_roundscale_ps(a.v, 11)}; }
FLASHRT_INLINE M below(L a, L b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
FLASHRT_INLINE M equal(L a, L b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
FLASHRT_INLINE M both(M a, M b) { return {static_cast<__mmask16>(a.v & b.v)}; }
FLASHRT_INLINE M either(M a, M b) { return {static_cast<__mmask16>(a.v | b.v)}; }
FLASHRT_INLINE M without(M a, M b) { return {static_cast<__mmask16>(a.v & ~b.v)}; }
FLASHRT_INLINE L select(M m, L a, L b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
FLASHRT_INLINE bool any(M m) { return m.v != 0; }

#elif defined(__AVX2__)

struct L { __m256 v; };
struct M { __m256 v; };
FLASHRT_INLINE L read_lanes(const float* p) { return {_mm256_loadu_ps(p)}; }
FLASHRT_INLINE void store(float* p, L a) { _mm256_storeu_ps(p, a.v); }
FLASHRT_INLINE L all(float a) { return {_mm256_set1_ps(a)}; }
FLASHRT_INLINE L add(L a, L b) { return {_mm256_add_ps(a.v, b.v)}; }
FLASHRT_INLINE L sub(L a, L b) { return {_mm256_sub_ps(a.v, b.v)}; }
FLASHRT_INLINE L mul(L a, L b) { return {_mm256_mul_ps(a.v, b.v)}; }
FLASHRT_INLINE L div(L a, L b) { return {_mm256_div_ps(a.v, b.v)}; }
FLASHRT_INLINE L fma(L a, L b, L c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FLASHRT_INLINE L min(L a, L b) { return {_mm256_min_ps(a.v, b.v)}; }
FLASHRT_INLINE L max(L a, L b) { return {_mm256_max_ps(a.v, b.v)}; }
FLASHRT_INLINE L round(L a) { return {_mm256_round_ps(a.v, 8)}; }
FLASHRT_INLINE L trunc(L a) { return {_mm256_round_ps(a.v, 11)}; }
FLASHRT_INLINE M below(L a, L b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
FLASHRT_INLINE M equal(L a, L b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
FLASHRT_INLINE M both(M a, M b) { return {_mm256_and_ps(a.v, b.v)}; }
FLASHRT_INLINE M either(M a, M b) { return {_mm256_or_ps(a.v, b.v)}; }
FLASHRT_INLINE M without(M a, M b) { return {_mm256_andnot_ps(b.v, a.v)}; }
FLASHRT_INLINE L select(M m, L a, L b) {  // compilers take the intrinsic apart, into a comparison and a blend
    __m256 r;
    asm("vblendvps %3, %2, %1, %0" : "=x"(r) : "x"(b.v), "x"(a.v), "x"(m.v));
    return {r};
}
FLASHRT_INLINE bool any(M m) { return _mm256_movemask_ps(m.v) != 0; }

#else

using L = F;
struct M { int32_t v[16]; };  // 0 or -1
FLASHRT_INLINE L read_lanes(const float* p) { return load(p); }
FLASHRT_INLINE L all(float a) { return splat(a); }
#define EACH_LANE(type, expression)                      \
    type r;                                              \
    for (int i = 0; i < 16; ++i) r.v[i] = (expression);  \
    return r
FLASHRT_INLINE L trunc(L a) { EACH_LANE(L, __builtin_truncf(a.v[i])); }
FLASHRT_INLINE M below(L a, L b) { EACH_LANE(M, a.v[i] < b.v[i] ? -1 : 0); }
FLASHRT_INLINE M equal(L a, L b) { EACH_LANE(M, a.v[i] == b.v[i] ? -1 : 0); }
FLASHRT_INLINE M both(M a, M b) { EACH_LANE(M, a.v[i] & b.v[i]); }
FLASHRT_INLINE M either(M a, M b) { EACH_LANE(M, a.v[i] | b.v[i]); }
FLASHRT_INLINE M without(M a, M b) { EACH_LANE(M, a.v[i] & ~b.v[i]); }
FLASHRT_INLINE L select(M m, L a, L b) { EACH_LANE(L, m.v[i] ? a.v[i] : b.v[i]); }
FLASHRT_INLINE bool any(M m) {
    int32_t found = 0;
    for (int i = 0; i < 16; ++i) found |= m.v[i];
    return found != 0;
}
#undef EACH_LANE

#endif

constexpr int LANES = sizeof(L) / sizeof(float);

FLASHRT_INLINE L nothing() { return all(0.0f); }
FLASHRT_INLINE L negated(L a) { return sub(all(-0.0f), a); }

// term(0) + ... + term(15), added as a tree: 16 → 8 → 4 → 2 → 1, term i with term i + half, as `sum` adds lanes.
template <typename Fn>
FLASHRT_INLINE L tree(Fn&& term) {
    L quarter[4];
    for (int i = 0; i < 4; ++i)
        quarter[i] = add(add(term(i), term(i + 8)), add(term(i + 4), term(i + 12)));
    return add(add(quarter[0], quarter[2]), add(quarter[1], quarter[3]));
}

// Where the weights of a group lie, and how many: fewer than INT4_GROUP at the end of a row.
struct GroupAt {
    const float* w;
    const float* importance;  // what the squared error of each weight counts; null: all the same
    int count;
};

// Sums over one group, and the range of its weights and zero: weights that are all equal have none.
struct Summary {
    float count, sum_w, sum_ww, top, range;  // `top` is how far the weights reach below zero

    // Past the end of the row the first weight repeats, which does not widen the range, and counts nothing.
    FLASHRT_INLINE explicit Summary(const GroupAt& group) {
        F w[2], importance[2];
        const float ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
        for (int j = 0; j < 2; ++j) {
            const int left = group.count - 16 * j;
            const float* counts = group.importance ? group.importance + 16 * j : ones;
            w[j] = left >= 16 ? load(group.w + 16 * j) : load_part(group.w + 16 * j, left, group.w[0]);
            importance[j] = left >= 16 ? load(counts) : load_part(counts, left);
        }
        const F w0 = mul(importance[0], w[0]), w1 = mul(importance[1], w[1]);
        count = sum(add(importance[0], importance[1]));
        sum_w = sum(add(w0, w1));
        sum_ww = sum(fma(w0, w[0], mul(w1, w[1])));
        top = highest(max(zero(), max(sub(zero(), w[0]), sub(zero(), w[1]))));
        const float high = highest(max(w[0], w[1]));
        range = high > -top ? high + top : 0.0f;
    }
};

// The weights of the groups in lanes. Without `weighted`, all groups are whole and every squared error counts the same.
template <bool weighted>
struct Groups {
    alignas(64) float w[INT4_GROUP][LANES];
    alignas(64) float importance[weighted ? INT4_GROUP : 1][LANES];

    FLASHRT_INLINE void put(int lane, const GroupAt& group) {
        for (int i = 0; i < INT4_GROUP; ++i) {
            const bool there = !weighted || i < group.count;
            w[i][lane] = there ? group.w[i] : group.w[0];
            if (weighted) importance[i][lane] = !there ? 0.0f : group.importance ? group.importance[i] : 1.0f;
        }
    }

    FLASHRT_INLINE L weight(int i) const { return read_lanes(w[i]); }
    FLASHRT_INLINE L share(int i) const { return weighted ? read_lanes(importance[weighted ? i : 0]) : all(1.0f); }

    // x as often as weight i counts.
    FLASHRT_INLINE L counted(L x, int i) const { return weighted ? mul(share(i), x) : x; }
};

// Of the groups in lanes; see Summary, which adds in the same order.
struct Sums {
    alignas(64) float count[LANES], sum_w[LANES], sum_ww[LANES];

    FLASHRT_INLINE void put(int lane, const Summary& summary) {
        count[lane] = summary.count;
        sum_w[lane] = summary.sum_w;
        sum_ww[lane] = summary.sum_ww;
    }

    template <bool weighted>
    FLASHRT_INLINE void put_all(const Groups<weighted>& g) {
        const auto cw = [&](int i) FLASHRT_LAMBDA { return g.counted(g.weight(i), i); };
        store(count, tree([&](int i) FLASHRT_LAMBDA { return add(g.share(i), g.share(i + 16)); }));
        store(sum_w, tree([&](int i) FLASHRT_LAMBDA { return add(cw(i), cw(i + 16)); }));
        store(sum_ww, tree([&](int i) FLASHRT_LAMBDA {
            return fma(cw(i), g.weight(i), mul(cw(i + 16), g.weight(i + 16)));
        }));
    }
};

}  // namespace flashrt::FLASHRT_ISA
