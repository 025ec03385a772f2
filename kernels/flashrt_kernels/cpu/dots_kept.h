// Rows of kept codecs times the activations of a few tokens, 64 weights at a time.
//
// Four products each are added as integers, exactly, before the scales of row and token; 16 sums go on side by side.
#pragma once

#include "activations.h"

namespace flashrt::FLASHRT_ISA {

template <class Format, bool FINE>
FLASHRT_INLINE I sums_of_four(B codes, const int8_t* coarse, size_t to_fine, const int32_t* lanes) {
    I sum;
    if constexpr (Format::SIGNED && FINE) sum = dot_signed_fine(codes, load_bytes(coarse), load_bytes(coarse + to_fine));
    else if constexpr (Format::SIGNED) sum = dot_signed(codes, load_bytes(coarse));
    else if constexpr (FINE) sum = dot_fine(codes, load_bytes(coarse), load_bytes(coarse + to_fine));
    else sum = dot(zero_i(), codes, load_bytes(coarse));
    if constexpr (Format::ZERO == 12) sum = sub(sum, add(left<3>(load_i(lanes)), left<2>(load_i(lanes))));
    if constexpr (Format::ZERO == 8) sum = sub(sum, left<3>(load_i(lanes)));
    if constexpr (Format::ZERO == 16) sum = sub(sum, left<4>(load_i(lanes)));
    if constexpr (Format::ZERO == 32) sum = sub(sum, left<5>(load_i(lanes)));
    return sum;
}

// The products of R rows with all tokens, ROOM at most; `out`: where each row's with the first token goes.
template <class Format, bool FINE, int R, int ROOM>
FLASHRT_INLINE void dot_kept(const uint8_t* const* rows, const uint8_t* const* next, const Tokens& t,
                             float* const* out, size_t token_step) {
    constexpr int CHUNKS = Format::CHUNKS, BYTES = Format::BYTES;
    const int count = ROOM == 1 ? 1 : t.count, units = t.kp / (CHUNK * CHUNKS);
    const size_t bytes = row_bytes(Format::CODEC, t.k);
    const int8_t* q = reinterpret_cast<const int8_t*>(t.q);
    const int32_t* all_lanes = reinterpret_cast<const int32_t*>(t.f);
    F acc[ROOM][R];
    for (int i = 0; i < count; ++i)
        for (int r = 0; r < R; ++r) acc[i][r] = zero();

    for (int u = 0; u < units; ++u) {
        uint8_t tail[R][BYTES];
        auto unit = [&](int r) FLASHRT_LAMBDA {
            for (int line = 0; line < BYTES; line += 64) prefetch(next[r] + static_cast<size_t>(u) * BYTES + line);
            return Format(unit_at<Format>(rows[r], static_cast<size_t>(u) * BYTES, bytes, tail[r]));
        };
        auto add_unit = [&](const Format* w) FLASHRT_LAMBDA {
            for (int j = 0; j < CHUNKS; ++j) {
                B codes[R];
                F scale[R];
                for (int r = 0; r < R; ++r) {
                    codes[r] = w[r].codes(j);
                    scale[r] = w[r].scale(j);
                }
                const int chunk = u * CHUNKS + j;
                for (int i = 0; i < count; ++i) {
                    const float* x_scale = t.scales + i * t.scale_step + 2 * chunk;
                    const int32_t* lanes = all_lanes + i * t.f_step + 16 * chunk;
                    const F both = pair(x_scale[0], x_scale[1]);
                    for (int r = 0; r < R; ++r) {
                        const I sum = sums_of_four<Format, FINE>(codes[r], q + i * 2 * t.q_step + CHUNK * chunk,
                                                                 t.q_step, lanes);
                        acc[i][r] = fma(to_float(sum), mul(scale[r], both), acc[i][r]);
                    }
                }
            }
            if constexpr (Format::OFFSETS)
                for (int i = 0; i < count; ++i)
                    for (int r = 0; r < R; ++r)
                        w[r].add_offsets(acc[i][r], t.sums + i * t.sum_step + 4 * u * CHUNKS,
                                         all_lanes + i * t.f_step + 16 * u, t.scales + i * t.scale_step + 2 * u);
        };
        if constexpr (R == 1) {
            const Format w[1] = {unit(0)};
            add_unit(w);
        } else {
            static_assert(R == 2);
            const Format w[2] = {unit(0), unit(1)};
            add_unit(w);
        }
    }
    for (int i = 0; i < count; ++i) {
        float sums[R];
        sum_each<R>(acc[i], sums);
        for (int r = 0; r < R; ++r) out[r][i * token_step] = sums[r];
    }
}

template <class Format, int R>
FLASHRT_INLINE void dot_kept_rows(const uint8_t* const* rows, const uint8_t* const* next, const Tokens& t,
                                  float* const* out, size_t token_step) {
    if (t.count == 1 && t.fine) dot_kept<Format, true, R, 1>(rows, next, t, out, token_step);
    else if (t.count == 1) dot_kept<Format, false, R, 1>(rows, next, t, out, token_step);
    else if (t.fine) dot_kept<Format, true, R, NARROW_TOKENS>(rows, next, t, out, token_step);
    else dot_kept<Format, false, R, NARROW_TOKENS>(rows, next, t, out, token_step);
}

}  // namespace flashrt::FLASHRT_ISA
