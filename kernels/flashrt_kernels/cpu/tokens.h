// Activations of up to 16 tokens in the calling thread's scratch memory.
#pragma once

#include "isa.h"
#include "pool.h"

namespace flashrt {

constexpr int BATCH = 16;  // tokens that share one reading of the weights

inline size_t tokens_bytes(int count, int kp) {
    const size_t groups = (kp / INT4_GROUP + 15) / 16 * 16;
    return static_cast<size_t>(count) * (static_cast<size_t>(kp) * 6 + groups * 8) + 256;
}

inline Tokens tokens_in(void* memory, int count, int k) {
    const int kp = padded(k);
    Tokens t{};
    t.count = count;
    t.k = k;
    t.kp = kp;
    t.groups = (kp / INT4_GROUP + 15) / 16 * 16;
    t.f = static_cast<float*>(memory);
    t.q = reinterpret_cast<int16_t*>(t.f + static_cast<size_t>(count) * kp);
    t.scale = reinterpret_cast<float*>(t.q + static_cast<size_t>(count) * kp);
    t.sums = t.scale + count * t.groups;
    return t;
}

}  // namespace flashrt
