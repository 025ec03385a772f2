// Byte layout of packed weight rows; rows.py is the specification.
#pragma once

#include <cstddef>
#include <cstdint>

#include "constants.h"

namespace flashrt {

enum class Codec : int {
    F32, BF16, INT8, INT4,
    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4  // kept
};

constexpr bool is_kept(Codec codec) { return codec >= Codec::Q4_0; }

struct KeptBlock {
    int weights, bytes;
};

constexpr KeptBlock kept_block(Codec codec) {
    switch (codec) {
        case Codec::Q4_0: return {32, 18};
        case Codec::Q4_1: return {32, 20};
        case Codec::Q5_0: return {32, 22};
        case Codec::Q5_1: return {32, 24};
        case Codec::Q8_0: return {32, 34};
        case Codec::Q4_K: return {256, 144};
        case Codec::Q5_K: return {256, 176};
        case Codec::Q6_K: return {256, 210};
        case Codec::IQ4_NL: return {32, 18};
        case Codec::IQ4_XS: return {256, 136};
        default: return {32, 17};
    }
}

constexpr int CHUNK = INT8_GROUP;  // weights decoded together; rows are padded to a multiple of it
constexpr int SPAN_WEIGHTS = INT4_SPAN * INT4_GROUP;

inline int padded(int k) { return (k + CHUNK - 1) / CHUNK * CHUNK; }

// How caches hold a token's key of a KV head, and its value behind it: numbers as they are, or both as rows of kept
// codecs, which are padded to whole chunks with zeros.
struct KvCodecs {
    Codec key, value;
    bool keys_only = false;  // there are keys alone: a value is the first numbers of its key
};

inline int spans(int k) { return (k + SPAN_WEIGHTS - 1) / SPAN_WEIGHTS; }

// Numbers that kernels which sum rows of `k` weights keep of each token: whole spans.
inline size_t sums_step(int k) { return static_cast<size_t>(spans(k)) * SPAN_WEIGHTS; }

// Groups of the span that group g is in, in a row of `groups`.
inline int span_groups(int groups, int g) {
    const int left = groups - g / INT4_SPAN * INT4_SPAN;
    return left < INT4_SPAN ? left : INT4_SPAN;
}

inline size_t row_bytes(Codec codec, int k) {
    const size_t kp = padded(k);
    if (is_kept(codec)) return static_cast<size_t>(k / kept_block(codec).weights) * kept_block(codec).bytes;
    switch (codec) {
        case Codec::F32: return 4 * kp;
        case Codec::BF16: return 2 * kp;
        case Codec::INT8: return kp + 2 * (kp / CHUNK);
        default: return kp / 2 + 2 * (kp / INT4_GROUP) + 8;
    }
}

// Bytes of a key or a value of `dim` numbers.
inline size_t kv_row_bytes(Codec codec, int dim) {
    if (is_kept(codec)) return row_bytes(codec, padded(dim));
    return static_cast<size_t>(dim) * (codec == Codec::F32 ? 4 : 2);
}

inline size_t kv_pair_bytes(KvCodecs codecs, int dim) {
    return kv_row_bytes(codecs.key, dim) + (codecs.keys_only ? 0 : kv_row_bytes(codecs.value, dim));
}

}  // namespace flashrt
