// Byte layout of packed weight rows; rows.py is the specification.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashrt {

enum class Codec : int { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

constexpr int CHUNK = 64;       // weights decoded together; rows are padded to a multiple of it
constexpr int INT4_GROUP = 32;  // weights that share a scale and an offset
constexpr int INT4_SPAN = 8;    // groups whose codes are stored together
constexpr int SPAN = INT4_SPAN * INT4_GROUP;
constexpr int MATRIX_ROWS = 8;  // rows of a matrix in one bundle

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
