// Rows of kept codecs times the activations of a few tokens.
//
// Products are added as integers, exactly, as far as scales allow: four of a block of 32 weights, and 16 of 256 weights
// whose groups have integers for scales. 16 such sums go on side by side in floating point.
#pragma once

#include "activations.h"

namespace flashrt::FLASHRT_ISA {

template <class Format>
FLASHRT_INLINE void fetch(const uint8_t* next, int unit) {
    for (int line = 0; line < Format::BYTES; line += 64) prefetch(next + static_cast<size_t>(unit) * Format::BYTES + line);
}

template <int ROOM, int R>
FLASHRT_INLINE void finish_kept(const F acc[ROOM][R], int count, float* const* out, size_t token_step) {
    for (int i = 0; i < count; ++i) {
        float sums[R];
        sum_each<R>(acc[i], sums);
        for (int r = 0; r < R; ++r) out[r][i * token_step] = sums[r];
    }
}

// Blocks of 256 weights. `out`: where each row's product with the first token goes; ROOM tokens at most.
template <class Format, int R, int ROOM>
FLASHRT_INLINE void dot_spans(const uint8_t* const* rows, const uint8_t* const* next, const Tokens& t,
                              float* const* out, size_t token_step) {
    const int count = ROOM == 1 ? 1 : t.count;
    const int8_t* q = reinterpret_cast<const int8_t*>(t.q);
    F acc[ROOM][R];
    for (int i = 0; i < count; ++i)
        for (int r = 0; r < R; ++r) acc[i][r] = zero();
    for (int u = 0; u < t.kp / SPAN_WEIGHTS; ++u) {
        Format w[R];
        B codes[R][4];
        W words[R][4];
        for (int r = 0; r < R; ++r) {
            fetch<Format>(next[r], u);
            w[r].open(rows[r] + static_cast<size_t>(u) * Format::BYTES);
            for (int j = 0; j < 4; ++j) {
                codes[r][j] = w[r].codes(j);
                words[r][j] = w[r].words(j);
            }
        }
        for (int i = 0; i < count; ++i) {
            const int8_t* x = q + i * 2 * t.q_step + SPAN_WEIGHTS * u;
            I coarse[R], fine[R];
            for (int r = 0; r < R; ++r) coarse[r] = fine[r] = zero_i();
            for (int j = 0; j < 4; ++j) {
                const B xc = load_bytes(x + CHUNK * j), xf = load_bytes(x + t.q_step + CHUNK * j);
                for (int r = 0; r < R; ++r) {
                    coarse[r] = Format::add(coarse[r], codes[r][j], xc, words[r][j]);
                    fine[r] = Format::add(fine[r], codes[r][j], xf, words[r][j]);
                }
            }
            const float x_scale = t.scales[i * t.scale_step + u];
            for (int r = 0; r < R; ++r) {
                const float scale = w[r].d * x_scale;
                acc[i][r] = fma(to_float(coarse[r]), splat(256.0f * scale), acc[i][r]);
                acc[i][r] = fma(to_float(fine[r]), splat(scale), acc[i][r]);
                w[r].add_rest(acc[i][r], t.sums + i * t.sum_step + 32 * u);
            }
        }
    }
    finish_kept<ROOM, R>(acc, count, out, token_step);
}

// Blocks of 32 weights, two at a time.
template <class Format, int R, int ROOM>
FLASHRT_INLINE void dot_blocks(const uint8_t* const* rows, const uint8_t* const* next, const Tokens& t,
                               float* const* out, size_t token_step) {
    const int count = ROOM == 1 ? 1 : t.count, each = t.each / CHUNK;
    const size_t bytes = row_bytes(Format::CODEC, t.k);
    const int8_t* q = reinterpret_cast<const int8_t*>(t.q);
    const int32_t* all_lanes = reinterpret_cast<const int32_t*>(t.f);
    F acc[ROOM][R];
    for (int i = 0; i < count; ++i)
        for (int r = 0; r < R; ++r) acc[i][r] = zero();
    for (int u = 0; u < t.kp / CHUNK; ++u) {
        uint8_t tail[R][Format::BYTES];
        Format w[R];
        B codes[R];
        F scale[R];
        for (int r = 0; r < R; ++r) {
            fetch<Format>(next[r], u);
            w[r].open(unit_at<Format>(rows[r], static_cast<size_t>(u) * Format::BYTES, bytes, tail[r]));
            codes[r] = w[r].codes(0);
            scale[r] = w[r].scale();
        }
        for (int i = 0; i < count; ++i) {
            const int8_t* x = q + i * 2 * t.q_step + CHUNK * u;
            const I lanes = load_i(all_lanes + i * t.f_step + 16 * u);
            const B xc = load_bytes(x), xf = load_bytes(x + t.q_step);
            const F x_scale = splat(t.scales[i * t.scale_step + u / each]);
            for (int r = 0; r < R; ++r) {
                I sum = Format::SIGNED ? dot_signed_fine(codes[r], xc, xf) : dot_fine(codes[r], xc, xf);
                static_assert(Format::ZERO == 0 || Format::ZERO == 8 || Format::ZERO == 12 || Format::ZERO == 16);
                if constexpr (Format::ZERO == 8) sum = sub(sum, left<3>(lanes));
                if constexpr (Format::ZERO == 16) sum = sub(sum, left<4>(lanes));
                if constexpr (Format::ZERO == 12) sum = sub(sum, add(left<3>(lanes), left<2>(lanes)));
                acc[i][r] = fma(to_float(sum), mul(scale[r], x_scale), acc[i][r]);
                if constexpr (Format::OFFSETS)
                    acc[i][r] = fma(to_float(lanes), mul(w[r].added(), x_scale), acc[i][r]);
            }
        }
    }
    finish_kept<ROOM, R>(acc, count, out, token_step);
}

template <class Format, int R>
FLASHRT_INLINE void dot_kept_rows(const uint8_t* const* rows, const uint8_t* const* next, const Tokens& t,
                                  float* const* out, size_t token_step) {
    if constexpr (Format::CHUNKS == 4) {
        if (t.count == 1) dot_spans<Format, R, 1>(rows, next, t, out, token_step);
        else dot_spans<Format, R, NARROW_TOKENS>(rows, next, t, out, token_step);
    } else {
        if (t.count == 1) dot_blocks<Format, R, 1>(rows, next, t, out, token_step);
        else dot_blocks<Format, R, NARROW_TOKENS>(rows, next, t, out, token_step);
    }
}

}  // namespace flashrt::FLASHRT_ISA
