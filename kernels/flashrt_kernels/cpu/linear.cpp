#include "ops.h"
#include "tokens.h"

namespace flashrt {
namespace {

void linear_batch(const LinearJob& job, int first, int count) {
    const Kernels& kernel = kernels();
    const Rows& w = job.weights;
    Tokens tokens = tokens_in(scratch(0, tokens_bytes(BATCH, padded(w.k))), count, w.k);
    for (int i = 0; i < count; ++i) kernel.prepare(w.codec, job.x + (first + i) * job.x_step, i, tokens);

    const size_t bytes = row_bytes(w.codec, w.k);
    const int64_t bundles = (job.rows + MATRIX_ROWS - 1) / MATRIX_ROWS;
    const int64_t grain = 1 + 65536 / static_cast<int64_t>(w.stride);
    float* out = job.out + first * job.out_step + job.row0;
    parallel_for((bundles + grain - 1) / grain, [&](int64_t item, int) {
        const int64_t end = (item + 1) * grain < bundles ? (item + 1) * grain : bundles;
        for (int64_t b = item * grain; b < end; ++b) {
            const int64_t row = b * MATRIX_ROWS;
            const int rows = static_cast<int>(job.rows - row < MATRIX_ROWS ? job.rows - row : MATRIX_ROWS);
            const size_t ahead = 4 * bytes < 16384 ? 16384 : 4 * bytes;
            kernel.dots(w.codec, w.data + b * w.stride, bytes, rows, tokens, out + row, 1, job.out_step, ahead);
            if (job.bias)
                for (int i = 0; i < count; ++i)
                    for (int r = 0; r < rows; ++r) out[i * job.out_step + row + r] += job.bias[row + r];
        }
    });
}

}  // namespace

void linear(const LinearJob& job) {
    for (int i = 0; i < job.tokens; i += BATCH)
        linear_batch(job, i, job.tokens - i < BATCH ? job.tokens - i : BATCH);
}

}  // namespace flashrt
