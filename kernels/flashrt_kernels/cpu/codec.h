// Byte layout of packed weight rows; rows.py is the specification.
#pragma once

#include <cstddef>
#include <cstdint>

#include "constants.h"

namespace flashrt {

enum class Codec : int { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

constexpr int CHUNK = INT8_GROUP;  // weights decoded together; rows are padded to a multiple of it
constexpr int SPAN = INT4_SPAN * INT4_GROUP;

inline int padded(int k) { return (k + CHUNK - 1) / CHUNK * CHUNK; }

inline int spans(int k) { return (k + SPAN - 1) / SPAN; }

// Numbers that kernels which sum rows of `k` weights keep of each token: whole spans.
inline size_t sums_step(int k) { return static_cast<size_t>(spans(k)) * SPAN; }

// Groups of the span that group g is in, in a row of `groups`.
inline int span_groups(int groups, int g) {
    const int left = groups - g / INT4_SPAN * INT4_SPAN;
    return left < INT4_SPAN ? left : INT4_SPAN;
}

inline size_t row_bytes(Codec codec, int k) {
    const size_t kp = padded(k);
    switch (codec) {
        case Codec::F32: return 4 * kp;
        case Codec::BF16: return 2 * kp;
        case Codec::INT8: return kp + 2 * (kp / CHUNK);
        default: return kp / 2 + 2 * (kp / INT4_GROUP) + 8;
    }
}

}  // namespace flashrt
