#include <atomic>
#include <cstring>
#include <thread>

#include "ops.h"
#include "tokens.h"

namespace flashrt {
namespace {

constexpr int BLOCK = 32;  // neurons whose h is kept between the two halves of the work
constexpr int UNIT = 128;  // neurons that one thread sums before y takes them: calls cut at multiples of it agree

size_t sums_step(int k) { return static_cast<size_t>(spans(k)) * SPAN; }

// gate·x and up·x of `count` neurons, then act(gate) * up, into h [tokens, BLOCK].
void hidden(const GluJob& job, const Tokens& tokens, const float* weights, int64_t neuron, int count, size_t ahead,
            float* h) {
    const Kernels& kernel = kernels();
    const Rows& w = job.neurons;
    float both[2][BATCH * BLOCK];  // gate, up
    const Bundles bundles{w.data + neuron * w.stride, w.stride, count, job.gated ? 2 : 1};
    kernel.dots(w.codec, bundles, tokens, {both[0], 1, BATCH * BLOCK, BLOCK}, ahead);
    for (int t = 0; t < tokens.count; ++t) {
        float* row = h + t * BLOCK;
        std::memcpy(row, both[0] + t * BLOCK, sizeof(float) * count);
        if (job.up_bias)
            for (int i = 0; i < count; ++i) row[i] += job.up_bias[neuron + i];
        kernel.activate(job.activation, row, job.gated ? both[1] + t * BLOCK : nullptr, count);
        if (weights)
            for (int i = 0; i < count; ++i) row[i] *= weights[t];
    }
}

// Adds neurons [first, last) to sums [tokens, sums_step]; `next` is what this thread will probably do after that.
void unit(const GluJob& job, const Tokens& tokens, const float* weights, int64_t first, int64_t last, int64_t next,
          float* sums) {
    const Rows& w = job.neurons;
    const size_t bytes = row_bytes(w.codec, w.k), down = bytes * (job.gated ? 2 : 1);
    float h[BATCH * BLOCK];
    for (int64_t neuron = first; neuron < last; neuron += BLOCK) {
        const int count = static_cast<int>(last - neuron < BLOCK ? last - neuron : BLOCK);
        const int64_t then = neuron + BLOCK < last ? neuron + BLOCK : next < w.bundles ? next : neuron;
        const size_t ahead = (then - neuron) * w.stride;
        hidden(job, tokens, weights, neuron, count, ahead, h);
        kernels().axpys(w.codec, w.data + neuron * w.stride + down, w.stride, count, w.k, h, BLOCK, tokens.count, sums,
                        sums_step(w.k), ahead);
    }
}

// Lets pieces of work pass one by one in their order. They are handed out in that order, so the next one is under way.
class Turnstile {
   public:
    void enter(int64_t item) const {
        for (int spin = 0; next_.load(std::memory_order_acquire) != item; ++spin)
            if (spin > 1000) std::this_thread::yield();
    }
    void leave(int64_t item) { next_.store(item + 1, std::memory_order_release); }

   private:
    std::atomic<int64_t> next_{0};
};

void glu_batch(const GluJob& job, int first, int count) {
    const Kernels& kernel = kernels();
    const Rows& w = job.neurons;
    Tokens tokens = tokens_in(scratch(0, tokens_bytes(BATCH, w.k)), count, w.k);
    const size_t step = sums_step(w.k);
    const int crew = threads();
    float* all_sums = static_cast<float*>(scratch(1, sizeof(float) * BATCH * step * crew));
    float* y[BATCH];
    for (int i = 0; i < count; ++i) {
        const int64_t token = job.chosen ? job.chosen[first + i] : first + i;
        kernel.prepare(w.codec, job.x + token * job.x_step, i, tokens);
        y[i] = job.y + token * job.y_step;
    }
    const float* weights = job.weights ? job.weights + first : nullptr;
    Turnstile turnstile;
    parallel_for((w.bundles + UNIT - 1) / UNIT, [&](int64_t item, int thread) {
        const int64_t from = item * UNIT, to = w.bundles - from < UNIT ? w.bundles : from + UNIT;
        float* sums = all_sums + thread * BATCH * step;
        std::memset(sums, 0, sizeof(float) * count * step);
        unit(job, tokens, weights, from, to, from + crew * UNIT, sums);
        turnstile.enter(item);
        for (int t = 0; t < count; ++t) kernel.collect(w.codec, sums + t * step, w.k, y[t]);
        turnstile.leave(item);
    }, crew);
}

}  // namespace

void glu(const GluJob& job) {
    for (int i = 0; i < job.tokens; i += BATCH) glu_batch(job, i, job.tokens - i < BATCH ? job.tokens - i : BATCH);
}

size_t reserve(int k) {
    const size_t activations = tokens_bytes(BATCH, k), sums = sizeof(float) * BATCH * sums_step(k) * threads();
    // Touched, so that they count when the process is measured.
    std::memset(scratch(0, activations), 0, activations);
    std::memset(scratch(1, sums), 0, sums);
    return activations + sums;
}

}  // namespace flashrt
