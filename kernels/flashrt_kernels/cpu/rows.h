// Decoding of packed rows, 64 weights (one chunk) at a time.
#pragma once

#include "formats/registry.h"
#include "isa.h"
#include "simd.h"

namespace flashrt::FLASHRT_ISA {

struct Int4Row {
    const uint8_t* codes;
    const uint8_t* a;  // scale codes, one per group
    const uint8_t* b;  // offset codes
    float u, v;

    FLASHRT_INLINE Int4Row(const uint8_t* row, int kp)
        : codes(row), a(row + kp / 2), b(a + kp / INT4_GROUP) {
        std::memcpy(&u, b + kp / INT4_GROUP, 4);
        std::memcpy(&v, b + kp / INT4_GROUP + 4, 4);
    }
};

FLASHRT_INLINE float bf16(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

FLASHRT_INLINE F load_codes(const uint8_t* codes, int n) {  // up to 16 bytes, zeros after
    if (n >= 16) return load_u8(codes);
    uint8_t tail[16] = {};
    for (int i = 0; i < n; ++i) tail[i] = codes[i];
    return load_u8(tail);
}

template <Codec codec>
FLASHRT_INLINE void decode(const uint8_t* row, int k, int chunk, F w[4]) {
    const int kp = padded(k);
    if constexpr (is_kept(codec)) {
        decode_kept<FormatOf<codec>>(row, k, chunk, w);
    } else if constexpr (codec == Codec::F32) {
        for (int j = 0; j < 4; ++j) w[j] = load(reinterpret_cast<const float*>(row) + CHUNK * chunk + 16 * j);
    } else if constexpr (codec == Codec::BF16) {
        for (int j = 0; j < 4; ++j) w[j] = load_bf16(reinterpret_cast<const uint16_t*>(row) + CHUNK * chunk + 16 * j);
    } else if constexpr (codec == Codec::INT8) {
        const F scale = splat(bf16(row + kp + 2 * chunk));
        for (int j = 0; j < 4; ++j)
            w[j] = mul(load_i8(reinterpret_cast<const int8_t*>(row) + CHUNK * chunk + 16 * j), scale);
    } else {
        const Int4Row r(row, kp);
        for (int j = 0; j < 2; ++j) {
            const int g = 2 * chunk + j, n = span_groups(kp / INT4_GROUP, g);
            const uint8_t* first = r.codes + 16 * (g / INT4_SPAN * INT4_SPAN) + 8 * (g % INT4_SPAN);
            const Table values = table(r.u * r.a[g], -(r.v * r.b[g]));
            w[2 * j] = look_up(first, values);
            w[2 * j + 1] = look_up(first + 8 * n, values);
        }
    }
}

// Calls f with the codec as a compile-time constant.
template <Codec c>
struct Constant {
    static constexpr Codec value = c;
};
template <typename Fn>
FLASHRT_INLINE void with_codec(Codec codec, Fn&& f) {
    switch (codec) {
        case Codec::F32: return f(Constant<Codec::F32>{});
        case Codec::BF16: return f(Constant<Codec::BF16>{});
        case Codec::INT8: return f(Constant<Codec::INT8>{});
        case Codec::INT4: return f(Constant<Codec::INT4>{});
        case Codec::Q4_0: return f(Constant<Codec::Q4_0>{});
        case Codec::Q4_1: return f(Constant<Codec::Q4_1>{});
        case Codec::Q5_0: return f(Constant<Codec::Q5_0>{});
        case Codec::Q5_1: return f(Constant<Codec::Q5_1>{});
        case Codec::Q8_0: return f(Constant<Codec::Q8_0>{});
        case Codec::Q4_K: return f(Constant<Codec::Q4_K>{});
        case Codec::Q5_K: return f(Constant<Codec::Q5_K>{});
        case Codec::Q6_K: return f(Constant<Codec::Q6_K>{});
        case Codec::IQ4_NL: return f(Constant<Codec::IQ4_NL>{});
        case Codec::IQ4_XS: return f(Constant<Codec::IQ4_XS>{});
        case Codec::MXFP4: return f(Constant<Codec::MXFP4>{});
    }
}

// Likewise where rows are not of a kept codec.
template <typename Fn>
FLASHRT_INLINE void with_own_codec(Codec codec, Fn&& f) {
    switch (codec) {
        case Codec::F32: return f(Constant<Codec::F32>{});
        case Codec::BF16: return f(Constant<Codec::BF16>{});
        case Codec::INT8: return f(Constant<Codec::INT8>{});
        default: return f(Constant<Codec::INT4>{});
    }
}

}  // namespace flashrt::FLASHRT_ISA
