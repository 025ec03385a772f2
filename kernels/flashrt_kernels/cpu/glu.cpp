#include <cmath>
#include <cstring>

#include "ops.h"
#include "tokens.h"
#include "turnstile.h"

namespace flashrt {
namespace {

constexpr int BLOCK = GATHER;  // neurons whose h is kept between the two halves of the work
constexpr int UNIT = NEURON_STEP;  // neurons that one thread sums before y takes them

// Where up to BLOCK neurons lie, and those that this thread will probably take after them.
struct Block {
    Block(const GluJob& job, int64_t first, int count, int64_t then) : first(first), count(count) {
        for (int i = 0; i < count; ++i) {
            at[i] = job.bundle(first + i);
            next[i] = then + i < job.count ? job.bundle(then + i) : at[i];
        }
    }

    Bundles rows(int n) const { return {at, next, count, n}; }

    // One row of each bundle, `offset` bytes into it.
    void dots(Codec codec, size_t offset, const Tokens& tokens, float* out) const {
        const uint8_t *rows[BLOCK], *after[BLOCK];
        for (int i = 0; i < count; ++i) {
            rows[i] = at[i] + offset;
            after[i] = next[i] + offset;
        }
        kernels().dots(codec, {rows, after, count, 1}, tokens, {out, 1, 0, BLOCK});
    }

    int64_t first;
    int count;
    const uint8_t *at[BLOCK], *next[BLOCK];
};

// gate·x and up·x of a block, then act(gate) * up, into h [tokens, BLOCK].
void activations(const GluJob& job, const Tokens& tokens, const float* factors, const Block& block, float* h) {
    const Kernels& kernel = kernels();
    float both[2][NARROW_TOKENS * BLOCK];  // gate, up
    const Neurons& w = job.neurons;
    if (!w.gated || w.gate == w.up) {
        kernel.dots(w.up, block.rows(w.gated ? 2 : 1), tokens, {both[0], 1, NARROW_TOKENS * BLOCK, BLOCK});
    } else {
        block.dots(w.gate, 0, tokens, both[0]);
        block.dots(w.up, w.up_at(), tokens, both[1]);
    }
    for (int t = 0; t < tokens.count; ++t) {
        float* row = h + t * BLOCK;
        std::memcpy(row, both[0] + t * BLOCK, sizeof(float) * block.count);
        float* up = w.gated ? both[1] + t * BLOCK : nullptr;
        job.finish(block.first, block.count, row, up, factors ? factors + t : nullptr);
        if (job.usage)
            for (int i = 0; i < block.count; ++i) job.usage[block.first + i] += std::fabs(row[i]);
    }
}

// Adds neurons [first, last) to sums [tokens, sums_step]; `next` is what this thread will probably do after that.
void unit(const GluJob& job, const Tokens& tokens, const float* factors, int64_t first, int64_t last, int64_t next,
          float* sums) {
    float h[NARROW_TOKENS * BLOCK];
    for (int64_t neuron = first; neuron < last; neuron += BLOCK) {
        const int count = static_cast<int>(last - neuron < BLOCK ? last - neuron : BLOCK);
        const Block block(job, neuron, count, neuron + BLOCK < last ? neuron + BLOCK : next);
        activations(job, tokens, factors, block, h);
        kernels().axpys(job.neurons.down, block.rows(1), job.neurons.down_at(), job.neurons.k, h, BLOCK, tokens.count,
                        sums, sums_step(job.neurons.k));
    }
}

void glu_batch(const GluJob& job, int first, int count) {
    const Kernels& kernel = kernels();
    const Neurons& w = job.neurons;
    Tokens tokens = tokens_in(scratch(0, tokens_bytes(NARROW_TOKENS, w.k)), count, w.k);
    const size_t step = sums_step(w.k);
    const int crew = threads();
    float* all_sums = static_cast<float*>(scratch(1, sizeof(float) * NARROW_TOKENS * step * crew));
    float* y[NARROW_TOKENS];
    for (int i = 0; i < count; ++i) {
        const int64_t token = job.chosen ? job.chosen[first + i] : first + i;
        kernel.prepare(w.up, job.x + token * job.x_step, i, tokens);
        y[i] = job.y + token * job.y_step;
    }
    const float* factors = job.factors ? job.factors + first : nullptr;
    Turnstile turnstile;
    parallel_for((job.count + UNIT - 1) / UNIT, [&](int64_t item, int thread) {
        const int64_t from = item * UNIT, to = job.count - from < UNIT ? job.count : from + UNIT;
        float* sums = all_sums + thread * NARROW_TOKENS * step;
        std::memset(sums, 0, sizeof(float) * count * step);
        unit(job, tokens, factors, from, to, from + crew * UNIT, sums);
        turnstile.enter(item);
        for (int t = 0; t < count; ++t) kernel.collect(w.down, count, sums + t * step, w.k, y[t]);
        turnstile.leave(item);
    }, crew);
}

}  // namespace

void GluJob::finish(int64_t neuron, int n, float* gate, float* up, const float* factor) const {
    if (gate_bias)
        for (int i = 0; i < n; ++i) gate[i] += gate_bias[neuron + i];
    if (up_bias) {
        float* biased = up ? up : gate;
        for (int i = 0; i < n; ++i) biased[i] += up_bias[neuron + i];
    }
    kernels().activate(activation, gate, up, n);
    if (factor)
        for (int i = 0; i < n; ++i) gate[i] *= *factor;
}

void glu(const GluJob& job) {
    if (job.neurons.group > 1) return glu_groups(job);
    for (int i = 0; i < job.tokens; i += NARROW_TOKENS)
        glu_batch(job, i, job.tokens - i < NARROW_TOKENS ? job.tokens - i : NARROW_TOKENS);
}

size_t reserve(int k) {
    const size_t activations = tokens_bytes(NARROW_TOKENS, k);
    const size_t sums = sizeof(float) * NARROW_TOKENS * sums_step(k) * threads();
    // Touched, so that they count when the process is measured.
    std::memset(scratch(0, activations), 0, activations);
    std::memset(scratch(1, sums), 0, sums);
    return activations + sums;
}

}  // namespace flashrt
