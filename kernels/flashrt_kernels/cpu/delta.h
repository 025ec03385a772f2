// One row of a gated delta net: its convolution, its norms, and a step of its recurrence.
#pragma once

#include "isa.h"
#include "vectors.h"

namespace flashrt::FLASHRT_ISA {

// x[0..n) = silu(the sum over taps of tap[0..n) times a row), the newest row first.
inline void convolve(const float* const* rows, const float* taps, size_t tap_step, int count, int n, float* x) {
    each16(n, [&](int c, int lanes) {
        F total = zero();
        for (int t = 0; t < count; ++t)
            total = fma(load_n(rows[t] + c, lanes), load_n(taps + (count - 1 - t) * tap_step + c, lanes), total);
        store_n(x + c, mul(total, sigmoid(total)), lanes);
    });
}

inline void l2_norm(float* x, int k, float scale) {
    const F by = splat(scale / std::sqrt(squares_of(x, k) + 1e-6f));
    each16(k, [&](int i, int n) { store_n(x + i, mul(load_n(x + i, n), by), n); });
}

// Four sums, so that no multiplication waits for the one before it; they are added in one order.
inline void delta_step(const DeltaStep& job) {
    const F decay = splat(job.decay);
    F held[4] = {zero(), zero(), zero(), zero()}, read[4] = {zero(), zero(), zero(), zero()};
    int d = 0;
    const auto recall = [&](int i) FLASHRT_LAMBDA {
        held[i] = fma(load(job.from + 16 * (d + i)), splat(job.key[d + i]), held[i]);
    };
    for (; d + 4 <= job.dim; d += 4)
        for (int i = 0; i < 4; ++i) recall(i);
    for (int i = 0; d + i < job.dim; ++i) recall(i);
    const F before = mul(decay, add(add(held[0], held[1]), add(held[2], held[3])));
    const F change = mul(splat(job.beta), sub(load_n(job.value, job.lanes), before));
    d = 0;
    const auto write = [&](int i) FLASHRT_LAMBDA {
        const F next = fma(load(job.from + 16 * (d + i)), decay, mul(splat(job.key[d + i]), change));
        store(job.to + 16 * (d + i), next);
        read[i] = fma(next, splat(job.query[d + i]), read[i]);
    };
    for (; d + 4 <= job.dim; d += 4)
        for (int i = 0; i < 4; ++i) write(i);
    for (int i = 0; d + i < job.dim; ++i) write(i);
    if (job.out) store_n(job.out, add(add(read[0], read[1]), add(read[2], read[3])), job.lanes);
}

inline void rms_norm_gated(const float* x, const float* gate, const float* weight, int k, float eps, float* out) {
    const F scale = splat(1.0f / std::sqrt(squares_of(x, k) / static_cast<float>(k) + eps));
    each16(k, [&](int i, int n) {
        const F g = load_n(gate + i, n);
        const F normed = mul(mul(load_n(x + i, n), scale), load_n(weight + i, n));
        store_n(out + i, mul(normed, mul(g, sigmoid(g))), n);
    });
}

inline void sigmoid_gate(float* x, const float* gate, int k) {
    each16(k, [&](int i, int n) { store_n(x + i, mul(load_n(x + i, n), sigmoid(load_n(gate + i, n))), n); });
}

}  // namespace flashrt::FLASHRT_ISA
