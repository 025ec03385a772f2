// Ways in which checkpoints store numbers; stored.py is the list.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashrt {

enum class Stored : int {
    F32, F16, BF16, F64, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4,
};

constexpr int STORED_KINDS = static_cast<int>(Stored::MXFP4) + 1;

struct StoredBlock {
    int numbers, bytes;
};

StoredBlock block_of(Stored);

struct StoredRows {
    Stored stored;
    const uint8_t* data;
    int64_t rows;
    size_t step;     // bytes from one row to the next
    int64_t blocks;  // of a row
};

// All numbers: out [rows, numbers of a row].
void stored_rows(const StoredRows&, float* out);

// Numbers [start, stop) of all rows, transposed: out [stop - start, rows].
void stored_columns(const StoredRows&, int64_t start, int64_t stop, float* out);

// Whether none of the numbers is infinite or NaN.
bool finite(const float* values, int64_t n);

}  // namespace flashrt
