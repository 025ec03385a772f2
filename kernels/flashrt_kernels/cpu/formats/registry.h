// Kept codecs by name: what `FormatOf` gives for each is its format. A new one is added here.
//
// A format says how a unit of a row is taken apart, that `open` is given: 64 CHUNKS weights in BYTES bytes.
//
//   codes(j)        codes of weights 64 j .. 64 j + 63 of the unit; signed bytes where SIGNED, else 0 to 63
//   scale_at(j, i)  the scale of weights 16 i .. 16 i + 15 of these
//   offset_at(j, i) what is taken off these, where OFFSETS
//
// A weight is scale * (code - ZERO) - offset, in this order of operations, as in ggml. A unit of two blocks of 32 weights:
//
//   scale(), added()  the scale of a block, and what is added where OFFSETS, in the lanes of its sums
//
// A unit of 256 weights, whose scales are integers times d:
//
//   words(j)            these integers, for the sums of two products of codes(j)
//   add(sum, ...)       sum and such products, multiplied by them
//   add_rest(acc, sums) acc and what offsets and ZERO make of the sums of x, lane by lane until all is there
#pragma once

#include "k_quants.h"
#include "plain.h"
#include "tables.h"

namespace flashrt::FLASHRT_ISA {

template <Codec codec> struct FormatOf_;
template <> struct FormatOf_<Codec::Q4_0> { using Type = Q4_0; };
template <> struct FormatOf_<Codec::Q4_1> { using Type = Q4_1; };
template <> struct FormatOf_<Codec::Q5_0> { using Type = Q5_0; };
template <> struct FormatOf_<Codec::Q5_1> { using Type = Q5_1; };
template <> struct FormatOf_<Codec::Q8_0> { using Type = Q8_0; };
template <> struct FormatOf_<Codec::Q4_K> { using Type = Q4_K; };
template <> struct FormatOf_<Codec::Q5_K> { using Type = Q5_K; };
template <> struct FormatOf_<Codec::Q6_K> { using Type = Q6_K; };
template <> struct FormatOf_<Codec::IQ4_NL> { using Type = Iq4Nl; };
template <> struct FormatOf_<Codec::IQ4_XS> { using Type = Iq4Xs; };
template <> struct FormatOf_<Codec::MXFP4> { using Type = Mxfp4; };
template <Codec codec> using FormatOf = typename FormatOf_<codec>::Type;

// Row `row` from byte `at` on as a whole unit; what lies beyond its `bytes` bytes is zeros, in `tail`.
template <class Format>
FLASHRT_INLINE const uint8_t* unit_at(const uint8_t* row, size_t at, size_t bytes, uint8_t* tail) {
    if (at + Format::BYTES <= bytes) return row + at;
    std::memset(tail, 0, Format::BYTES);
    std::memcpy(tail, row + at, bytes - at);
    return tail;
}

// Chunk `chunk` of a row of k weights.
template <class Format>
FLASHRT_INLINE void decode_kept(const uint8_t* row, int k, int chunk, F w[4]) {
    uint8_t tail[Format::BYTES], codes[64];
    Format unit;
    unit.open(unit_at<Format>(row, static_cast<size_t>(chunk / Format::CHUNKS) * Format::BYTES,
                              row_bytes(Format::CODEC, k), tail));
    const int j = chunk % Format::CHUNKS;
    store_bytes(codes, unit.codes(j));
    for (int i = 0; i < 4; ++i) {
        F q = Format::SIGNED ? load_i8(reinterpret_cast<const int8_t*>(codes) + 16 * i) : load_u8(codes + 16 * i);
        if (Format::ZERO) q = sub(q, splat(static_cast<float>(Format::ZERO)));
        w[i] = mul(splat(unit.scale_at(j, i)), q);
        if constexpr (Format::OFFSETS) w[i] = sub(w[i], splat(unit.offset_at(j, i)));
    }
}

}  // namespace flashrt::FLASHRT_ISA
