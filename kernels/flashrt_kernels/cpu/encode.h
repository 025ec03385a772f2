// Encoding of rows.
#pragma once

#include "encode_int4.h"

namespace flashrt::FLASHRT_ISA {

inline void encode_int8(const float* w, int k, uint8_t* row) {
    const int kp = padded(k);
    for (int c = 0; c < kp / CHUNK; ++c) {
        F v[4], most = zero();
        for (int j = 0; j < 4; ++j) {
            const int at = CHUNK * c + 16 * j;
            v[j] = k - at >= 16 ? load(w + at) : load_part(w + at, k - at);
            most = max(abs(v[j]), most);
        }
        const float top = highest(most);
        uint16_t half = to_bf16(top / 127.0f);
        if (bf16(reinterpret_cast<const uint8_t*>(&half)) * 127.0f < top) ++half;  // up: nothing may clip
        const float scale = bf16(reinterpret_cast<const uint8_t*>(&half));
        const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        for (int j = 0; j < 4; ++j)
            store_i8(reinterpret_cast<int8_t*>(row) + CHUNK * c + 16 * j,
                     min(splat(127.0f), max(splat(-127.0f), round(mul(v[j], splat(inverse))))));
        std::memcpy(row + kp + 2 * c, &half, 2);
    }
}

inline void encode_row(Codec codec, const float* w, int k, uint8_t* row) {
    if (codec == Codec::INT8) return encode_int8(w, k, row);
    const size_t used = codec == Codec::F32 ? 4 : 2;
    std::memset(row + used * k, 0, used * (padded(k) - k));
    if (codec == Codec::F32) std::memcpy(row, w, used * k);
    else
        for (int i = 0; i < k; ++i) {
            const uint16_t half = to_bf16(w[i]);
            std::memcpy(row + 2 * i, &half, 2);
        }
}

// Rows w [n, k] to rows that lie `stride` bytes apart.
inline void encode(Codec codec, const float* w, int64_t n, int k, const float* importance, uint8_t* out,
                   size_t stride) {
    if (codec == Codec::INT4) return encode_int4(w, n, k, importance, out, stride);
    for (int64_t i = 0; i < n; ++i) encode_row(codec, w + i * k, k, out + i * stride);
}

inline void decode_row(Codec codec, const uint8_t* row, int k, float* out) {
    const int kp = padded(k);
    with_codec(codec, [&](auto c) {
        for (int chunk = 0; chunk < kp / CHUNK; ++chunk) {
            F w[4];
            decode<c.value>(row, k, chunk, w);
            for (int j = 0; j < 4; ++j) {
                const int at = CHUNK * chunk + 16 * j;
                if (k - at >= 16) store(out + at, w[j]);
                else store_part(out + at, w[j], k - at);
            }
        }
    });
}

}  // namespace flashrt::FLASHRT_ISA
