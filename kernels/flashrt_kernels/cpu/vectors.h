// Norms, rotary embedding and activation functions.
#pragma once

#include "simd.h"
#include "isa.h"

namespace flashrt::FLASHRT_ISA {

template <typename Fn>
FLASHRT_INLINE void each16(int n, Fn&& f) {  // f(offset, lanes)
    int i = 0;
    for (; i + 16 <= n; i += 16) f(i, 16);
    if (i < n) f(i, n - i);
}
FLASHRT_INLINE F load_n(const float* p, int n) { return n == 16 ? load(p) : load_part(p, n); }
FLASHRT_INLINE void store_n(float* p, F a, int n) { n == 16 ? store(p, a) : store_part(p, a, n); }

inline float squares_of(const float* x, int k) {
    F squares = zero();
    each16(k, [&](int i, int n) {
        const F v = load_n(x + i, n);
        squares = fma(v, v, squares);
    });
    return sum(squares);
}

inline void rms_norm(const float* x, const float* weight, int k, float eps, float* out) {
    const F scale = splat(1.0f / std::sqrt(squares_of(x, k) / static_cast<float>(k) + eps));
    each16(k, [&](int i, int n) { store_n(out + i, mul(mul(load_n(x + i, n), scale), load_n(weight + i, n)), n); });
}

inline void layer_norm(const float* x, const float* weight, const float* bias, int k, float eps, float* out) {
    F total = zero();
    each16(k, [&](int i, int n) { total = add(total, load_n(x + i, n)); });
    const float mean = sum(total) / static_cast<float>(k);
    F squares = zero();
    each16(k, [&](int i, int n) {
        const F v = sub(n == 16 ? load(x + i) : load_part(x + i, n, mean), splat(mean));
        squares = fma(v, v, squares);
    });
    const F scale = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(k) + eps));
    each16(k, [&](int i, int n) {
        F v = mul(mul(sub(load_n(x + i, n), splat(mean)), scale), load_n(weight + i, n));
        if (bias) v = add(v, load_n(bias + i, n));
        store_n(out + i, v, n);
    });
}

inline void rope(float* x, const float* cos, const float* sin, int half) {
    each16(half, [&](int i, int n) {
        const F a = load_n(x + i, n), b = load_n(x + half + i, n), c = load_n(cos + i, n), s = load_n(sin + i, n);
        store_n(x + i, sub(mul(a, c), mul(b, s)), n);
        store_n(x + half + i, add(mul(b, c), mul(a, s)), n);
    });
}

FLASHRT_INLINE F gelu_tanh(F x) {
    const F inner = mul(splat(0.7978845608f), fma(mul(mul(x, x), x), splat(0.044715f), x));
    return mul(x, sigmoid(add(inner, inner)));  // (1 + tanh(z)) / 2 = sigmoid(2z)
}

FLASHRT_INLINE F gelu(F x) {
    float lanes[16];
    store(lanes, x);
    for (float& v : lanes) v = 0.5f * v * std::erfc(-0.70710678f * v);
    return load(lanes);
}

inline void activate(Activation activation, float* gate, const float* up, int n) {
    each16(n, [&](int i, int lanes) {
        F v = load_n(gate + i, lanes);
        switch (activation.function) {
            case Function::SILU: v = mul(v, sigmoid(v)); break;
            case Function::GELU_TANH: v = gelu_tanh(v); break;
            case Function::GELU: v = gelu(v); break;
            case Function::RELU: v = above(v, splat(activation.threshold)); break;
            case Function::RELU2:
                v = max(zero(), v);
                v = mul(v, v);
                break;
            case Function::CLAMPED_SWIGLU:  // comparisons keep what is not a number
                v = min(splat(activation.limit), v);
                v = mul(v, sigmoid(mul(splat(activation.threshold), v)));
                break;
        }
        if (up) {
            F u = load_n(up + i, lanes);
            if (activation.function == Function::CLAMPED_SWIGLU) {
                u = max(splat(-activation.limit), min(splat(activation.limit), u));
                u = add(u, splat(1.0f));
            }
            v = mul(v, u);
        }
        store_n(gate + i, v, lanes);
    });
}

}  // namespace flashrt::FLASHRT_ISA
