// Products of bfloat16 by AMX's tiles: 16 rows, 16 columns, 32 numbers deep.
//
// An element of a sum takes 32 products at a time, in ascending order, so it does not depend on which rows share its
// tiles, nor on where the depth is cut, as long as that is at multiples of 32.
#pragma once

#if defined(__AMX_BF16__)

#include <immintrin.h>

#include <cstring>

#include "simd.h"

namespace flashrt::FLASHRT_ISA {

constexpr int TILE_ROWS = 16;
constexpr int TILE_DEPTH = 32;

struct Halves {  // rows of bfloat16; a number is the sum of `parts` of them, which lie `part` apart
    const uint16_t* data;
    size_t step;
    int parts = 1;
    size_t part = 0;

    Halves at(size_t row, size_t column) const { return {data + row * step + column, step, parts, part}; }
};

struct Stripes {  // [16 columns][depth / 2][2] each
    const char* data;
    size_t bytes;
};

struct Columns {
    float* data;
    ptrdiff_t step;
};

// The tiles of up to 32 rows: sums in 0 to 3, rows in 4 and 5, columns in 6 and 7.
class Tiles {
   public:
    explicit Tiles(int rows) {
        struct {
            uint8_t palette, start, unused[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } shape{};
        shape.palette = 1;
        const int low = rows < TILE_ROWS ? rows : TILE_ROWS, high = rows > TILE_ROWS ? rows - TILE_ROWS : TILE_ROWS;
        const int counts[8] = {low, low, high, high, low, high, TILE_ROWS, TILE_ROWS};
        for (int i = 0; i < 8; ++i) {
            shape.bytes[i] = 64;
            shape.rows[i] = static_cast<uint8_t>(counts[i]);
        }
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// GCC's intrinsics do not say that they read memory.
FLASHRT_INLINE void written() { __asm__ volatile("" ::: "memory"); }

template <bool HIGH, bool WIDE>
FLASHRT_INLINE void add_step(const uint16_t* a, size_t a_bytes, const char* b, size_t stripe) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (WIDE) {
        _tile_loadd(7, b + stripe, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    if (HIGH) {
        _tile_loadd(5, reinterpret_cast<const char*>(a) + TILE_ROWS * a_bytes, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if (WIDE) _tile_dpbf16ps(3, 5, 7);
    }
}

// The last numbers of a depth that is no multiple of 32, and zeros behind them.
template <bool HIGH, bool WIDE>
inline void add_rest(const Halves& a, int rows, const char* b, size_t stripe, int rest) {
    alignas(64) uint16_t left[2 * TILE_ROWS][TILE_DEPTH] = {};
    alignas(64) char right[2][TILE_ROWS][64] = {};
    const int pairs = (rest + 1) / 2;
    for (int j = 0; j < (WIDE ? 2 : 1); ++j) std::memcpy(right[j], b + j * stripe, 64 * static_cast<size_t>(pairs));
    for (int part = 0; part < a.parts; ++part) {
        for (int i = 0; i < rows; ++i)
            std::memcpy(left[i], a.data + part * a.part + i * a.step, 2 * static_cast<size_t>(rest));
        written();
        add_step<HIGH, WIDE>(left[0], sizeof left[0], right[0][0], sizeof right[0]);
    }
}

template <bool HIGH, bool WIDE>
inline void add_tiles(const Halves& a, int rows, const Stripes& b, int depth, const Columns& c, bool accumulate) {
    const size_t c_bytes = static_cast<size_t>(4 * c.step);
    float* high = c.data + TILE_ROWS * c.step;
    if (accumulate) {
        _tile_loadd(0, c.data, c_bytes);
        if (WIDE) _tile_loadd(1, c.data + 16, c_bytes);
        if (HIGH) _tile_loadd(2, high, c_bytes);
        if (HIGH && WIDE) _tile_loadd(3, high + 16, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    const char* from = b.data;
    int k = 0;
    for (; k + TILE_DEPTH <= depth; k += TILE_DEPTH, from += 1024)
        for (int part = 0; part < a.parts; ++part)
            add_step<HIGH, WIDE>(a.data + part * a.part + k, 2 * a.step, from, b.bytes);
    if (k < depth) add_rest<HIGH, WIDE>(a.at(0, k), rows, from, b.bytes, depth - k);
    _tile_stored(0, c.data, c_bytes);
    if (WIDE) _tile_stored(1, c.data + 16, c_bytes);
    if (HIGH) _tile_stored(2, high, c_bytes);
    if (HIGH && WIDE) _tile_stored(3, high + 16, c_bytes);
}

// c[rows, 16 * stripes] (+)= a · b, for up to 32 rows whose `Tiles` are there.
inline void add_products(const Halves& a, int rows, const Stripes& b, int stripes, int depth, const Columns& c,
                         bool accumulate) {
    written();
    for (int j = 0; j < stripes; j += 2) {
        const bool wide = j + 1 < stripes;
        const Stripes own{b.data + j * b.bytes, b.bytes};
        const Columns to{c.data + 16 * j, c.step};
        if (rows > TILE_ROWS && wide) add_tiles<true, true>(a, rows, own, depth, to, accumulate);
        else if (rows > TILE_ROWS) add_tiles<true, false>(a, rows, own, depth, to, accumulate);
        else if (wide) add_tiles<false, true>(a, rows, own, depth, to, accumulate);
        else add_tiles<false, false>(a, rows, own, depth, to, accumulate);
    }
}

// Calls f(first row, rows) for all rows, so many at a time as have tiles.
template <typename Fn>
FLASHRT_INLINE void by_tiles(int rows, Fn&& f) {
    for (int from = 0; from < rows; from += 2 * TILE_ROWS) {
        const int count = rows - from < 2 * TILE_ROWS ? rows - from : 2 * TILE_ROWS;
        const Tiles tiles(count);
        f(from, count);
    }
}

}  // namespace flashrt::FLASHRT_ISA

#endif
