#include "stored.h"

#include <atomic>
#include <cstring>

#include "isa.h"
#include "pool.h"

namespace flashrt {
namespace {

constexpr int TILE_ROWS = 32;  // rows decoded together: of what they give, whole cache lines are written

int64_t pieces(int64_t n, int64_t grain) { return (n + grain - 1) / grain; }

}  // namespace

StoredBlock block_of(Stored stored) {
    static constexpr StoredBlock BLOCKS[STORED_KINDS] = {
        {1, 4},    {1, 2},    {1, 2},     {1, 8},     {32, 18},   {32, 20},   {32, 22},   {32, 24},  {32, 34},
        {256, 84}, {256, 110}, {256, 144}, {256, 176}, {256, 210}, {32, 18},  {256, 136}, {32, 17},
    };
    return BLOCKS[static_cast<int>(stored)];
}

void stored_rows(const StoredRows& rows, float* out) {
    const int64_t k = rows.blocks * block_of(rows.stored).numbers, grain = 1 + 65536 / k;
    parallel_for(pieces(rows.rows, grain), [&](int64_t item, int) {
        for (int64_t i = item * grain; i < rows.rows && i < (item + 1) * grain; ++i)
            kernels().decode_stored(rows.stored, rows.data + i * rows.step, rows.blocks, out + i * k);
    });
}

void stored_columns(const StoredRows& rows, int64_t start, int64_t stop, float* out) {
    const StoredBlock block = block_of(rows.stored);
    // A stripe of columns is decoded at a time, of a few rows: what fits in the first-level cache.
    const int64_t stripe = block.numbers > 64 ? block.numbers : 64;
    const int64_t first = start / stripe, stripes = pieces(stop, stripe) - first;
    parallel_for(pieces(rows.rows, TILE_ROWS) * stripes, [&](int64_t item, int) {
        const int64_t row = item / stripes * TILE_ROWS, column = (first + item % stripes) * stripe;
        const int64_t count = rows.rows - row < TILE_ROWS ? rows.rows - row : TILE_ROWS;
        const int64_t left = rows.blocks - column / block.numbers, most = stripe / block.numbers;
        float* tile = static_cast<float*>(scratch(0, TILE_ROWS * stripe * sizeof(float)));
        for (int64_t r = 0; r < count; ++r)
            kernels().decode_stored(rows.stored, rows.data + (row + r) * rows.step + column / block.numbers * block.bytes,
                                    left < most ? left : most, tile + r * stripe);
        const int64_t from = start > column ? start : column, to = stop < column + stripe ? stop : column + stripe;
        for (int64_t c = from; c < to; ++c)
            for (int64_t r = 0; r < count; ++r) out[(c - start) * rows.rows + row + r] = tile[r * stripe + c - column];
    });
}

bool finite(const float* values, int64_t n) {
    constexpr int64_t GRAIN = 1 << 18;
    std::atomic<bool> all{true};
    parallel_for(pieces(n, GRAIN), [&](int64_t item, int) {
        const int64_t end = (item + 1) * GRAIN < n ? (item + 1) * GRAIN : n;
        if (!kernels().finite(values + item * GRAIN, end - item * GRAIN)) all.store(false, std::memory_order_relaxed);
    });
    return all.load();
}

}  // namespace flashrt
