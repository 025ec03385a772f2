// The running softmax of some queries: what they saw so far, which those of later segments are merged into.
#pragma once

#include <cmath>
#include <cstring>

#include "isa.h"

namespace flashrt {

inline int rounded(int dim) { return (dim + 15) / 16 * 16; }

struct Partial {
    float *best, *total, *acc;  // [queries], [queries], [queries, D rounded up to 16]
};

inline size_t partial_floats(int queries, int dim16) { return static_cast<size_t>(queries) * (dim16 + 2); }

inline Partial partial_at(float* memory, int queries) { return {memory, memory + queries, memory + 2 * queries}; }

// One query has seen nothing yet, or its head's sink: a score whose value is zero.
inline void clear(Partial& p, int query, int dim16, const float* sink) {
    p.best[query] = sink ? *sink : -INFINITY;
    p.total[query] = sink ? 1.0f : 0.0f;
    std::memset(p.acc + static_cast<size_t>(query) * dim16, 0, sizeof(float) * dim16);
}

inline void merge(int dim16, int queries, Partial& into, const Partial& from) {
    for (int i = 0; i < queries; ++i)
        kernels().merge(dim16, into.best + i, into.total + i, into.acc + static_cast<size_t>(i) * dim16, from.best[i],
                        from.total[i], from.acc + static_cast<size_t>(i) * dim16);
}

}  // namespace flashrt
