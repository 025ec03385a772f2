#include "ops.h"
#include "tokens.h"

namespace flashrt {
namespace {

constexpr int BLOCK = 512;  // neurons whose h is kept between the two phases
constexpr int GRAIN = 16;   // neurons of one piece of work

// gate·x and up·x of neurons [first, first + count) of the block, then act(gate) * up, into h [tokens, BLOCK].
void hidden(const GluJob& job, const Tokens& tokens, const float* weights, int64_t neuron, int first, int count,
            float* h) {
    const Kernels& kernel = kernels();
    const Rows& w = job.neurons;
    const size_t bytes = row_bytes(w.codec, w.k);
    float up[BATCH * GRAIN];
    for (int i = 0; i < count; ++i) {
        const uint8_t* bundle = w.data + (neuron + first + i) * w.stride;
        float both[2 * BATCH];  // [gate or up, token]
        kernel.dots(w.codec, bundle, bytes, job.gated ? 2 : 1, tokens, both, BATCH, 1, 2 * w.stride);
        for (int t = 0; t < tokens.count; ++t) {
            h[t * BLOCK + first + i] = both[t];
            if (job.gated) up[t * GRAIN + i] = both[BATCH + t];
            else if (job.up_bias) h[t * BLOCK + first + i] += job.up_bias[neuron + first + i];
        }
    }
    for (int t = 0; t < tokens.count; ++t) {
        float* row = h + t * BLOCK + first;
        kernel.activate(job.activation, row, job.gated ? up + t * GRAIN : nullptr, count);
        if (weights)
            for (int i = 0; i < count; ++i) row[i] *= weights[t];
    }
}

void glu_batch(const GluJob& job, int first, int count) {
    const Kernels& kernel = kernels();
    const Rows& w = job.neurons;
    Tokens tokens = tokens_in(scratch(0, tokens_bytes(BATCH, padded(w.k))), count, w.k);
    float* h = static_cast<float*>(scratch(1, sizeof(float) * BATCH * BLOCK));
    float* y[BATCH];
    for (int i = 0; i < count; ++i) {
        const int64_t token = job.chosen ? job.chosen[first + i] : first + i;
        kernel.prepare(w.codec, job.x + token * job.x_step, i, tokens);
        y[i] = job.y + token * job.y_step;
    }
    const float* weights = job.weights ? job.weights + first : nullptr;
    const size_t down = row_bytes(w.codec, w.k) * (job.gated ? 2 : 1);
    const int chunks = padded(w.k) / CHUNK, pieces = threads();

    for (int64_t neuron = 0; neuron < w.bundles; neuron += BLOCK) {
        const int block = static_cast<int>(w.bundles - neuron < BLOCK ? w.bundles - neuron : BLOCK);
        parallel_for((block + GRAIN - 1) / GRAIN, [&](int64_t item, int) {
            const int from = static_cast<int>(item) * GRAIN;
            hidden(job, tokens, weights, neuron, from, block - from < GRAIN ? block - from : GRAIN, h);
        });
        parallel_for(pieces, [&](int64_t item, int) {
            const int from = static_cast<int>(chunks * item / pieces), to = static_cast<int>(chunks * (item + 1) / pieces);
            kernel.axpys(w.codec, w.data + neuron * w.stride + down, w.stride, block, w.k, from, to, h, BLOCK, count, y);
        });
    }
}

}  // namespace

void glu(const GluJob& job) {
    for (int i = 0; i < job.tokens; i += BATCH) glu_batch(job, i, job.tokens - i < BATCH ? job.tokens - i : BATCH);
}

size_t reserve(int k, int64_t) {
    const size_t bytes = tokens_bytes(BATCH, padded(k));
    scratch(0, bytes);
    scratch(1, sizeof(float) * BATCH * BLOCK);
    return bytes + sizeof(float) * BATCH * BLOCK;
}

}  // namespace flashrt
