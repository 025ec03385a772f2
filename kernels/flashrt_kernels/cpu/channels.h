// Gate and up projections whose weights lie by input channel, so that channels can be left out.
//
// Channels come in groups of 32 that share a scale and an offset for each column (gate columns first, then up columns).
// A code of four bits is split into its upper two, the coarse half, and its lower two, the fine one. A channel takes part
// with both halves, with the coarse one alone, read as the middle of what it may stand for, or not at all.
//
// Columns come in tiles of 256, 64 bytes of a channel's half: byte 16 L + 4 p + d holds those of columns
// 64 k + 16 p + 4 L + d in its bits 2 k and 2 k + 1, for k of 0 to 3. Four channels' bytes, interleaved, are then dot
// products of 16 neighbouring columns.
#pragma once

#include "tile.h"

namespace flashrt::FLASHRT_ISA {

// What a token brings to a group: rounds x (of 32 channels, zeros for those left out) and lists who takes part.
// `wanted` has 2 for both halves, 1 for the coarse one, 0 for none; only the first `fine` channels have a fine half.
inline void choose_channels(const float* x, const uint8_t* wanted, ActiveChannels& a) {
    F v[2], most = zero(), poison = zero();
    for (int j = 0; j < 2; ++j) {
        v[j] = load(x + 16 * j);
        most = max(most, abs(v[j]));
        poison = fma(v[j], zero(), poison);  // NaN if x is not finite, and then so is the result
    }
    const float top = highest(most);
    const F inverse = splat(top > 1e-30f ? 127.0f / top : 0.0f);
    int8_t codes[CHANNELS];
    for (int j = 0; j < 2; ++j) store_i8(codes + 16 * j, mul(v[j], inverse));
    a.scale = (top > 1e-30f ? top / 127.0f : 0.0f) + sum(poison);

    int32_t total = 0, middle = 0;
    int8_t taken[2][CHANNELS + 4] = {};
    a.count[0] = a.count[1] = 0;
    for (int i = 0; i < CHANNELS; ++i) {
        if (!wanted[i]) continue;
        total += codes[i];
        for (int half = 0; half < wanted[i]; ++half) {
            taken[half][a.count[half]] = codes[i];
            a.channel[half][a.count[half]++] = static_cast<uint8_t>(i);
        }
        if (wanted[i] == 1) middle += codes[i];
    }
    for (int half = 0; half < 2; ++half) {
        for (int i = a.count[half]; i % 4; ++i) a.channel[half][i] = a.channel[half][0];  // times zero
        std::memcpy(a.x[half], taken[half], CHANNELS);
    }
    a.middle = 3 * middle;
    a.sum = static_cast<float>(total) * a.scale;
}

// One half of the channels of a group, at one tile.
struct HalfTile {
    const uint8_t* data;
    size_t step;
    const uint8_t* channel;
    int count;

    HalfTile(const ChannelGroup& g, const ActiveChannels& a, int half, size_t at)
        : data(g.half[half] + at), step(g.step), channel(a.channel[half]), count(a.count[half]) {}
    FLASHRT_INLINE void fetch(int quad) const {
        if (quad >= count) return;
        for (int j = 0; j < 4; ++j) prefetch(data + channel[quad + j] * step);
    }
};

// acc[4 k + p] += the codes of columns 64 k + 16 p.. of some channels, times their x. `next` is fetched little by little:
// a core has few misses in flight, and loads of what is in its cache already wait behind a burst of them.
FLASHRT_INLINE void add_quads(const HalfTile& half, const int32_t* x, const HalfTile& next, I acc[16]) {
    for (int i = 0; i < half.count; i += 4) {
        B r[4];
        for (int j = 0; j < 4; ++j) r[j] = load_bytes(half.data + half.channel[i + j] * half.step);
        next.fetch(i);
        interleave(r);
        const B xs = splat_quad(x[i / 4]);
        for (int p = 0; p < 4; ++p) {
            acc[p] = dot(acc[p], two_bits<0>(r[p]), xs);
            acc[4 + p] = dot(acc[4 + p], two_bits<2>(r[p]), xs);
            acc[8 + p] = dot(acc[8 + p], two_bits<4>(r[p]), xs);
            acc[12 + p] = dot(acc[12 + p], two_bits<6>(r[p]), xs);
        }
    }
    for (int i = (half.count + 3) / 4 * 4; i < next.count; i += 4) next.fetch(i);
}

// sums[c] += the channels of one group for the columns c of tiles [from, to); `next` is fetched meanwhile.
inline void add_channels(const ChannelGroup& g, const ActiveChannels& a, const ChannelGroup& next,
                         const ActiveChannels& after, int from, int to, const float* ratio, float* sums) {
    const F scale = splat(0.5f * a.scale), sum = splat(-a.sum);
    const I middle = splat_i(a.middle);
    for (int tile = from; tile < to; ++tile) {
        const size_t at = static_cast<size_t>(tile) * 64;
        I acc[16];
        for (I& sum_of_codes : acc) sum_of_codes = zero_i();
        add_quads({g, a, 0, at}, a.x[0], {next, after, 0, at}, acc);
        for (I& sum_of_codes : acc) sum_of_codes = left<2>(sum_of_codes);
        add_quads({g, a, 1, at}, a.x[1], {next, after, 1, at}, acc);
        settle(acc);
        for (int i = 0; i < 16; ++i) {
            const size_t column = 4 * at + 16 * static_cast<size_t>(i);
            if (i % 4 == 0) prefetch(next.a + column);
            if (i % 4 == 2) prefetch(next.b + column - 32);
            const F codes = to_float(add(left<1>(acc[i]), middle));
            const F offset = mul(load_u8(g.b + column), load(ratio + column));
            F total = fma(mul(load_u8(g.a + column), scale), codes, load(sums + column));
            store(sums + column, fma(offset, sum, total));
        }
    }
}

// Codes of 64 columns of one channel, in their order: those in bits 2 k and 2 k + 1 of the bytes of a tile.
FLASHRT_INLINE void channel_codes(const uint8_t* coarse, const uint8_t* fine, int k, uint8_t codes[64]) {
    constexpr uint64_t TWO_BITS = 0x0303030303030303u;
    uint64_t words[8], low[8];
    std::memcpy(words, coarse, 64);
    for (uint64_t& word : words) word = (word >> 2 * k & TWO_BITS) << 2;
    if (fine) {
        std::memcpy(low, fine, 64);
        for (int i = 0; i < 8; ++i) words[i] |= low[i] >> 2 * k & TWO_BITS;
    }
    uint32_t from[16], to[16];
    std::memcpy(from, words, 64);
    for (int i = 0; i < 16; ++i) to[i] = from[i % 4 * 4 + i / 4];
    std::memcpy(codes, to, 64);
}

// Weights of 64 columns from `column` on for one channel of a group, in units of each column's own scale.
FLASHRT_INLINE void channel_weights(const ChannelGroup& g, int channel, bool fine, size_t column, const F scale[4],
                                    const F offset[4], F weights[4]) {
    const size_t at = channel * g.step + column / 256 * 64;
    uint8_t codes[64];
    channel_codes(g.half[0] + at, fine ? g.half[1] + at : nullptr, column % 256 / 64, codes);
    const F middle = splat(fine ? 0.0f : 1.5f);
    for (int p = 0; p < 4; ++p) weights[p] = sub(mul(scale[p], add(load_u8(codes + 16 * p), middle)), offset[p]);
}

// Packs 64 columns of all channels of a group into four stripes of a panel.
inline void pack_channels(const ChannelGroup& g, int fine, size_t column, const float* ratio, bool half, void* panel,
                          size_t stripe) {
    F scale[4], offset[4];
    for (int p = 0; p < 4; ++p) {
        const size_t at = column + 16 * p;
        scale[p] = load_u8(g.a + at);
        offset[p] = mul(load_u8(g.b + at), load(ratio + at));
    }
    char* to = static_cast<char*>(panel);
    for (int i = 0; i < CHANNELS; i += 2) {
        F even[4], odd[4];
        channel_weights(g, i, i < fine, column, scale, offset, even);
        channel_weights(g, i + 1, i + 1 < fine, column, scale, offset, odd);
        for (int p = 0; p < 4; ++p) {
            char* at = to + p * stripe;
            if (half) {
                store_pairs(reinterpret_cast<uint32_t*>(at), even[p], odd[p]);
            } else {
                store(reinterpret_cast<float*>(at), even[p]);
                store(reinterpret_cast<float*>(at + 64), odd[p]);
            }
        }
        to += half ? 64 : 128;
    }
}

}  // namespace flashrt::FLASHRT_ISA
