// Activations of up to NARROW_TOKENS tokens in the calling thread's scratch memory.
#pragma once

#include "isa.h"
#include "pool.h"

namespace flashrt {

// Sizes and steps, without memory.
inline Tokens tokens_of(int count, int k) {
    const int kp = padded(k);
    Tokens t{};
    t.count = count;
    t.k = k;
    t.kp = kp;
    t.q_step = static_cast<size_t>(spans(k)) * SPAN_WEIGHTS;
    t.scale_step = static_cast<size_t>(spans(k)) * 2 * INT4_SPAN;
    t.sum_step = static_cast<size_t>(spans(k)) * 32;
    t.each = SPAN_WEIGHTS;
    t.f_step = static_cast<size_t>(kp);
    return t;
}

inline Tokens tokens_in(void* memory, int count, int k) {
    Tokens t = tokens_of(count, k);
    t.f = static_cast<float*>(memory);
    t.q = reinterpret_cast<int16_t*>(t.f + count * t.f_step);
    t.scales = reinterpret_cast<float*>(t.q + count * t.q_step);
    t.sums = t.scales + count * t.scale_step;
    return t;
}

inline size_t tokens_bytes(int count, int k) {
    const Tokens t = tokens_of(count, k);
    return static_cast<size_t>(count) * (4 * t.f_step + 2 * t.q_step + 4 * t.scale_step + 4 * t.sum_step) + 64;
}

}  // namespace flashrt
