#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ops.h"
#include "pool.h"

namespace flashrt {
namespace {

constexpr int LANES = 16;  // columns of a state that are carried on together
constexpr int CHANNELS_ON = 256;  // channels that a thread convolves at a time

// The row that each row follows; -1 and below: rows of the tail, the last one first.
std::vector<int32_t> followed(const DeltaJob& job) {
    std::vector<int32_t> before(job.rows);
    for (int i = 0; i < job.rows; ++i) {
        const int behind = i - job.advance;
        before[i] = behind < 0 || !job.parents          ? i - 1
                    : job.parents[behind] < 0 ? job.advance - 1
                                              : job.advance + job.parents[behind];
    }
    return before;
}

// The tail after the rows that advance the state.
void next_tail(const DeltaJob& job, float* tail) {
    for (int t = 0; t < job.taps_count - 1; ++t) {
        const int row = job.advance - (job.taps_count - 1) + t;
        const float* from = row < 0 ? job.tail + (t + job.advance) * job.channels : job.x + row * job.x_step;
        std::memcpy(tail + t * job.channels, from, sizeof(float) * job.channels);
    }
}

// In place: the last row first, so that each finds what it follows as it was.
void convolve_all(const DeltaJob& job, const int32_t* before) {
    const int64_t pieces = (job.channels + CHANNELS_ON - 1) / CHANNELS_ON;
    parallel_for(pieces, [&](int64_t piece, int) {
        const int64_t first = piece * CHANNELS_ON;
        const int n = static_cast<int>(std::min<int64_t>(CHANNELS_ON, job.channels - first));
        const float* rows[MOST_TAPS];
        for (int i = job.rows - 1; i >= 0; --i) {
            int32_t row = i;
            for (int t = 0; t < job.taps_count; ++t) {
                rows[t] = first + (row >= 0 ? job.x + row * job.x_step
                                            : job.tail + (job.taps_count - 1 + row) * job.channels);
                row = row >= 0 ? before[row] : row - 1;
            }
            kernels().convolve(rows, job.taps + first, job.channels, job.taps_count, n, job.x + i * job.x_step + first);
        }
    });
}

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// Norms of queries and keys, and what gates are: the share that is written, and the share that stays.
void prepare(const DeltaJob& job) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(job.dim));
    parallel_for(job.rows, [&](int64_t i, int) {
        float* x = job.x + i * job.x_step;
        for (int h = 0; h < job.key_heads; ++h) {
            kernels().l2_norm(x + h * job.dim, job.dim, scale);
            kernels().l2_norm(x + (job.key_heads + h) * job.dim, job.dim, 1.0f);
        }
        float *beta = job.gates + i * job.gates_step, *decay = beta + job.heads;
        for (int h = 0; h < job.heads; ++h) {
            beta[h] = 1.0f / (1.0f + std::exp(-beta[h]));
            decay[h] = std::exp(job.rate[h] * softplus(decay[h] + job.bias[h]));
        }
    });
}

// Columns of a head's state, between [dim, values] and [dim, LANES].
void gather(const float* state, size_t step, int dim, int lanes, float* block) {
    for (int d = 0; d < dim; ++d) {
        for (int i = 0; i < lanes; ++i) block[d * LANES + i] = state[d * step + i];
        for (int i = lanes; i < LANES; ++i) block[d * LANES + i] = 0.0f;
    }
}

void scatter(const float* block, size_t step, int dim, int lanes, float* state) {
    for (int d = 0; d < dim; ++d)
        for (int i = 0; i < lanes; ++i) state[d * step + i] = block[d * LANES + i];
}

// All rows over some columns of a head's state. Those behind the rows that advance it get a state of their own each.
void recur(const DeltaJob& job, const int32_t* before, int head, int first, float* blocks) {
    const int lanes = std::min(LANES, job.values - first);
    const size_t block = static_cast<size_t>(job.dim) * LANES;
    const int keys = job.tiled ? head % job.key_heads : head / (job.heads / job.key_heads);
    float* state = job.state + static_cast<size_t>(head) * job.dim * job.values + first;
    gather(state, job.values, job.dim, lanes, blocks);
    const auto of = [&](int row) { return row < job.advance ? blocks : blocks + (row - job.advance + 1) * block; };
    for (int i = 0; i < job.rows; ++i) {
        const float* x = job.x + i * job.x_step;
        const float* gates = job.gates + i * job.gates_step;
        const int place = i - job.skipped;
        kernels().delta_step({of(before[i]), of(i), job.dim, lanes, x + keys * job.dim,
                              x + (job.key_heads + keys) * job.dim,
                              x + 2 * job.key_heads * job.dim + head * job.values + first, gates[head],
                              gates[job.heads + head],
                              place < 0 ? nullptr : job.out + place * job.out_step + head * job.values + first});
        if (i == job.advance - 1) scatter(blocks, job.values, job.dim, lanes, state);
    }
}

size_t tail_floats(int64_t channels, int taps) { return static_cast<size_t>(channels) * (taps - 1); }
size_t block_floats(int dim) { return static_cast<size_t>(dim) * LANES * (NARROW_TOKENS + 1); }

}  // namespace

size_t delta_rule_scratch_bytes(int64_t channels, int taps, int dim, int crew) {
    return sizeof(float) * (tail_floats(channels, taps) + crew * block_floats(dim));
}

void delta_rule(const DeltaJob& job) {
    const std::vector<int32_t> before = followed(job);
    float* tail = static_cast<float*>(job.scratch);
    float* blocks = tail + tail_floats(job.channels, job.taps_count);
    next_tail(job, tail);
    convolve_all(job, before.data());
    std::memcpy(job.tail, tail, sizeof(float) * tail_floats(job.channels, job.taps_count));
    prepare(job);
    const int parts = (job.values + LANES - 1) / LANES;
    parallel_for(static_cast<int64_t>(job.heads) * parts, [&](int64_t item, int thread) {
        const int head = static_cast<int>(item / parts), first = static_cast<int>(item % parts) * LANES;
        recur(job, before.data(), head, first, blocks + thread * block_floats(job.dim));
    }, job.crew);
}

}  // namespace flashrt
