// Wide passes: weights are decoded once per call into panels and multiplied by all tokens.

#include <cmath>
#include <cstring>

#include "ops.h"
#include "pool.h"

namespace flashrt {
namespace {

static_assert(NEURON_STEP % PANEL == 0 && MATRIX_STEP * MATRIX_ROWS % PANEL == 0, "calls are cut between panels");

constexpr size_t PANEL_BYTES = 512 * 1024;  // per thread; half of a second-level cache

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Elements from one token to the next in the left operand: off the power of two that would hit one cache set.
size_t left_step(int64_t depth) { return static_cast<size_t>((depth + 63) / 64 * 64 + 32); }

struct Left {  // [tokens, step] of float or bfloat16
    char* data;
    size_t step;
    bool half;
    char* at(int token, int column) const { return data + (token * step + column) * (half ? 2 : 4); }
};

bool use_half(Codec codec) { return kernels().half_gemm && codec != Codec::F32; }

void fill_row(const Left& left, int t, int k, const float* row) {
    char* to = left.at(t, 0);
    if (left.half) {
        uint16_t* halves = reinterpret_cast<uint16_t*>(to);
        kernels().to_half(row, k, halves);
        if (k & 1) halves[k] = 0;
    } else {
        std::memcpy(to, row, sizeof(float) * k);
    }
}

template <typename Row>
void fill_left(const Left& left, int tokens, int k, Row&& row) {
    parallel_for(tokens, [&](int64_t t, int) { fill_row(left, static_cast<int>(t), k, row(t)); });
}

// Columns of the row in one packed panel of 64 rows.
int panel_depth(int k, bool half) {
    const int fits = static_cast<int>(PANEL_BYTES / (PANEL * (half ? 2 : 4)));
    return padded(k) < fits ? padded(k) : fits;
}

// c[t][0..63] = left · panel for all tokens, where pack(from, to, panel) packs columns [from, to) of the weights.
// `c(t)` is where a token's 64 sums go.
// With `add`, to what is there.
template <typename Pack, typename Out>
void multiply(const Left& left, int tokens, int k, char* panel, Pack&& pack, Out&& c, bool add = false) {
    const int depth = panel_depth(k, left.half);
    for (int from = 0; from < k; from += depth) {
        const int to = k - from < depth ? k : from + depth;
        const size_t stripe = static_cast<size_t>(padded(to - from)) * (left.half ? 32 : 64);
        pack(from, to, panel, stripe);
        for (int t = 0; t < tokens; t += TILE) {
            const int rows = tokens - t < TILE ? tokens - t : TILE;
            float* out[TILE];
            for (int m = 0; m < rows; ++m) out[m] = c(t + m);
            kernels().tile(left.half, rows, left.at(t, from), left.step, panel, stripe, to - from, out, add || from > 0);
        }
    }
}

struct Memory {  // carves up the caller's scratch
    char* next;
    char* take(size_t bytes) {
        char* result = next;
        next += aligned(bytes);
        return result;
    }
};

size_t panel_bytes() { return PANEL_BYTES + 4096; }

size_t panels_of(int64_t neurons) { return static_cast<size_t>(neurons) * 2 / PANEL + 1; }

}  // namespace

size_t gemm_scratch_bytes(int tokens, int k, int64_t neurons, int crew) {
    const size_t left = aligned(tokens * left_step(k) * 4);
    const size_t sums = aligned(static_cast<size_t>(tokens) * PANEL * 4);
    const size_t h = aligned(tokens * left_step(neurons) * 4);
    const size_t along = aligned((static_cast<size_t>(neurons) + 1) * PANEL * 4);
    const size_t panel = panel_bytes() > along ? panel_bytes() : along;
    return left + h + aligned(sizeof(float) * panels_of(neurons)) + crew * (sums + aligned(panel)) + 64;
}

void gemm_linear(const LinearJob& job, void* memory, int crew) {
    const Rows& w = job.weights;
    Memory scratch{reinterpret_cast<char*>(aligned(reinterpret_cast<size_t>(memory)))};
    const bool half = use_half(w.codec);
    const Left left{scratch.take(job.tokens * left_step(w.k) * (half ? 2 : 4)), left_step(w.k), half};
    const size_t sums_bytes = aligned(static_cast<size_t>(job.tokens) * PANEL * 4), each = aligned(panel_bytes());
    char* sums = scratch.take(crew * sums_bytes);
    char* panels = scratch.take(crew * each);
    fill_left(left, job.tokens, w.k, [&](int64_t t) { return job.x + t * job.x_step; });

    const size_t bytes = row_bytes(w.codec, w.k);
    parallel_for((job.rows + PANEL - 1) / PANEL, [&](int64_t item, int thread) {
        const int64_t first = item * PANEL;
        const int columns = static_cast<int>(job.rows - first < PANEL ? job.rows - first : PANEL);
        float* c = reinterpret_cast<float*>(sums + thread * sums_bytes);
        auto pack = [&](int from, int to, char* panel, size_t stripe) {
            for (int j = 0; j < PANEL / 16; ++j) {
                const uint8_t* rows[16];
                int count = 0;
                for (int64_t r = first + 16 * j; r < first + columns && count < 16; ++r)
                    rows[count++] = w.data + r / MATRIX_ROWS * w.stride + r % MATRIX_ROWS * bytes;
                kernels().pack_across(w.codec, rows, count, w.k, from, to, half, panel + j * stripe);
            }
        };
        float* out = job.out + job.row0 + first;
        const bool whole = columns == PANEL;  // then the sums go straight to where they belong
        multiply(left, job.tokens, w.k, panels + thread * each, pack,
                 [&](int t) { return whole ? out + t * job.out_step : c + t * PANEL; });
        for (int t = 0; t < job.tokens; ++t) {
            float* row = out + t * job.out_step;
            if (!whole) std::memcpy(row, c + t * PANEL, sizeof(float) * columns);
            if (job.bias)
                for (int i = 0; i < columns; ++i) row[i] += job.bias[first + i];
        }
    }, crew);
}

void gemm_linear_add(const AddJob& job, void* memory, int crew) {
    const Rows& w = job.weights;
    Memory scratch{reinterpret_cast<char*>(aligned(reinterpret_cast<size_t>(memory)))};
    const bool half = use_half(w.codec);
    const Left left{scratch.take(job.tokens * left_step(w.k) * (half ? 2 : 4)), left_step(w.k), half};
    const size_t sums_bytes = aligned(static_cast<size_t>(job.tokens) * PANEL * 4), each = aligned(panel_bytes());
    char* sums = scratch.take(crew * sums_bytes);
    char* panels = scratch.take(crew * each);
    fill_left(left, job.tokens, w.k, [&](int64_t t) { return job.x + t * job.x_step; });

    parallel_for((w.bundles + PANEL - 1) / PANEL, [&](int64_t item, int thread) {
        const int64_t first = item * PANEL;
        const int columns = static_cast<int>(w.bundles - first < PANEL ? w.bundles - first : PANEL);
        const size_t bytes = sizeof(float) * columns;
        float* c = reinterpret_cast<float*>(sums + thread * sums_bytes);
        auto pack = [&](int from, int to, char* panel, size_t stripe) {
            for (int j = 0; j < PANEL / 16; ++j) {
                const uint8_t* rows[16];
                int n = 0;
                for (int r = 16 * j; r < columns && n < 16; ++r) rows[n++] = w.data + (first + r) * w.stride;
                kernels().pack_across(w.codec, rows, n, w.k, from, to, half, panel + j * stripe);
            }
        };
        const bool whole = columns == PANEL;
        for (int t = 0; t < job.tokens && !whole; ++t) std::memcpy(c + t * PANEL, job.to(t) + first, bytes);
        multiply(left, job.tokens, w.k, panels + thread * each, pack,
                 [&](int t) { return whole ? job.to(t) + first : c + t * PANEL; }, true);
        for (int t = 0; t < job.tokens && !whole; ++t) std::memcpy(job.to(t) + first, c + t * PANEL, bytes);
    }, crew);
}

namespace {

// act(gate) * up of one panel's neurons, from its sums to h. `usage` takes |h|: of all in a group, or of each.
void finish(const GluJob& job, const Left& h, int64_t first, int count, int t, float* sums, float* usage) {
    const Kernels& kernel = kernels();
    const bool each = job.neurons.group == 1;
    job.finish(first, count, sums, job.neurons.gated ? sums + PANEL / 2 : nullptr, job.factors ? job.factors + t : nullptr);
    if (usage)
        for (int i = 0; i < count; ++i) usage[each ? i : 0] += std::fabs(sums[i]);
    char* to = h.at(t, static_cast<int>(first));
    if (h.half) kernel.to_half(sums, count, reinterpret_cast<uint16_t*>(to));
    else std::memcpy(to, sums, sizeof(float) * count);
}

// y(t) += h[t] · the rows of w, which are one row of each bundle. `panels` and `sums` have room for each thread.
template <typename Out>
void multiply_down(const Rows& w, const Left& h, int tokens, char* panels, size_t each, char* sums, size_t sums_bytes,
                   Out&& y, int crew) {
    const int neurons = static_cast<int>(w.bundles);
    const bool half = h.half;
    if (half && neurons & 1)
        for (int t = 0; t < tokens; ++t) std::memset(h.at(t, neurons), 0, 2);
    parallel_for(padded(w.k) / CHUNK, [&](int64_t chunk, int thread) {
        char* panel = panels + thread * each;
        float* c = reinterpret_cast<float*>(sums + thread * sums_bytes);
        kernels().pack_along(w.codec, w.data, w.stride, neurons, w.k, static_cast<int>(chunk), half, panel);
        const size_t stripe = static_cast<size_t>(half ? (neurons + 1) / 2 : neurons) * 64;
        const int64_t column = chunk * CHUNK;
        const int columns = static_cast<int>(w.k - column < CHUNK ? w.k - column : CHUNK);
        for (int t = 0; t < tokens; t += TILE) {
            const int rows = tokens - t < TILE ? tokens - t : TILE;
            float* out[TILE];
            for (int m = 0; m < rows; ++m) {
                float* to = y(t + m) + column;
                out[m] = columns == CHUNK ? to : c + m * PANEL;
                if (columns < CHUNK) std::memcpy(out[m], to, sizeof(float) * columns);
            }
            kernels().tile(half, rows, h.at(t, 0), h.step, panel, stripe, neurons, out, true);
            if (columns < CHUNK)
                for (int m = 0; m < rows; ++m)
                    std::memcpy(y(t + m) + column, out[m], sizeof(float) * columns);
        }
    }, crew);
}

// Likewise where down lies along the neurons, bundle by bundle.
template <typename Out>
void multiply_groups(const Neurons& w, const Left& h, int tokens, char* panels, size_t each, char* sums,
                     size_t sums_bytes, Out&& y, int crew) {
    const size_t bytes = row_bytes(w.down, w.group);
    const size_t stripe = static_cast<size_t>(padded(w.group)) * (h.half ? 32 : 64);
    parallel_for((w.k + PANEL - 1) / PANEL, [&](int64_t item, int thread) {
        const int64_t column = item * PANEL;
        const int columns = static_cast<int>(w.k - column < PANEL ? w.k - column : PANEL);
        char* panel = panels + thread * each;
        float* c = reinterpret_cast<float*>(sums + thread * sums_bytes);
        for (int t = 0; t < tokens && columns < PANEL; ++t)
            std::memcpy(c + t * PANEL, y(t) + column, sizeof(float) * columns);
        for (int64_t b = 0; b < w.bundles; ++b) {
            const uint8_t* down = w.data + b * w.stride + w.down_at() + column * bytes;
            for (int j = 0; j < PANEL / 16; ++j) {
                const uint8_t* rows[16];
                int n = 0;
                for (int r = 16 * j; r < columns && n < 16; ++r) rows[n++] = down + r * bytes;
                kernels().pack_across(w.down, rows, n, w.group, 0, w.group, h.half, panel + j * stripe);
            }
            for (int t = 0; t < tokens; t += TILE) {
                const int rows = tokens - t < TILE ? tokens - t : TILE;
                float* out[TILE];
                for (int m = 0; m < rows; ++m) out[m] = columns == PANEL ? y(t + m) + column : c + (t + m) * PANEL;
                kernels().tile(h.half, rows, h.at(t, static_cast<int>(b) * w.group), h.step, panel, stripe, w.group,
                               out, true);
            }
        }
        for (int t = 0; t < tokens && columns < PANEL; ++t)
            std::memcpy(y(t) + column, c + t * PANEL, sizeof(float) * columns);
    }, crew);
}

}  // namespace

void gemm_glu(const GluJob& job, void* memory, int crew) {
    const Neurons& w = job.neurons;
    const int neurons = static_cast<int>(w.bundles) * w.group;
    Memory scratch{reinterpret_cast<char*>(aligned(reinterpret_cast<size_t>(memory)))};
    const bool half = use_half(w.up);
    const Left left{scratch.take(job.tokens * left_step(w.k) * (half ? 2 : 4)), left_step(w.k), half};
    const Left h{scratch.take(job.tokens * left_step(neurons) * (half ? 2 : 4)), left_step(neurons), half};
    const size_t sums_bytes = aligned(static_cast<size_t>(job.tokens) * PANEL * 4);
    const size_t along = static_cast<size_t>(neurons + 1) * PANEL * (half ? 2 : 4);
    const size_t each = aligned(panel_bytes() > along ? panel_bytes() : along);
    char* sums = scratch.take(crew * sums_bytes);
    char* panels = scratch.take(crew * each);
    float* used = reinterpret_cast<float*>(scratch.take(sizeof(float) * panels_of(neurons)));
    auto row_of = [&](int64_t t) { return job.chosen ? static_cast<int64_t>(job.chosen[t]) : t; };
    fill_left(left, job.tokens, w.k, [&](int64_t t) { return job.x + row_of(t) * job.x_step; });

    const int kinds = w.gated ? 2 : 1, per_panel = PANEL / kinds;  // gate columns first, then up columns
    parallel_for((neurons + per_panel - 1) / per_panel, [&](int64_t item, int thread) {
        const int first = static_cast<int>(item) * per_panel;
        const int count = neurons - first < per_panel ? neurons - first : per_panel;
        float* c = reinterpret_cast<float*>(sums + thread * sums_bytes);
        auto pack = [&](int from, int to, char* panel, size_t stripe) {
            for (int j = 0; j < PANEL / 16; ++j) {
                const bool gate = w.gated && 16 * j < per_panel;
                const Codec codec = gate ? w.gate : w.up;
                const size_t offset = gate ? 0 : w.up_at(), bytes = row_bytes(codec, w.k);
                const uint8_t* rows[16];
                int n = 0;
                for (int i = first + 16 * j % per_panel; i < first + count && n < 16; ++i)
                    rows[n++] = w.data + i / w.group * w.stride + offset + i % w.group * bytes;
                kernels().pack_across(codec, rows, n, w.k, from, to, half, panel + j * stripe);
            }
        };
        float* usage = !job.usage ? nullptr : w.group == 1 ? job.usage + first : used + item;
        if (job.usage) used[item] = 0.0f;
        multiply(left, job.tokens, w.k, panels + thread * each, pack, [&](int t) { return c + t * PANEL; });
        for (int t = 0; t < job.tokens; ++t) finish(job, h, first, count, t, c + t * PANEL, usage);
    }, crew);
    auto y = [&](int t) { return job.y + row_of(t) * job.y_step; };
    if (w.group > 1) {
        if (job.usage)
            for (int i = 0; i < neurons; i += per_panel) job.usage[i / w.group] += used[i / per_panel];
        return multiply_groups(w, h, job.tokens, panels, each, sums, sums_bytes, y, crew);
    }
    const Rows rows = {w.down, w.k, w.data + w.down_at(), w.stride, neurons};
    multiply_down(rows, h, job.tokens, panels, each, sums, sums_bytes, y, crew);
}

size_t gate_up_scratch_bytes(int tokens, int groups, int crew) {
    const int depth = groups * CHANNELS;
    return aligned(tokens * left_step(depth) * 4) + crew * (aligned(panel_bytes()) + aligned(sizeof(float) * depth)) + 64;
}

void gemm_gate_up(const GateUpJob& job, void* memory, int crew) {
    const ChannelGroups& w = job.groups;
    const int depth = static_cast<int>(w.count) * CHANNELS;
    const bool half = kernels().half_gemm;
    Memory scratch{reinterpret_cast<char*>(aligned(reinterpret_cast<size_t>(memory)))};
    const Left left{scratch.take(job.tokens * left_step(depth) * (half ? 2 : 4)), left_step(depth), half};
    const size_t each = aligned(panel_bytes());
    char* panels = scratch.take(crew * each);
    const size_t row_size = aligned(sizeof(float) * depth);
    char* ordered = scratch.take(crew * row_size);
    parallel_for(job.tokens, [&](int64_t t, int thread) {
        float* row = reinterpret_cast<float*>(ordered + thread * row_size);
        for (int i = 0; i < depth; ++i) {
            const int32_t channel = job.order[w.first * CHANNELS + i];
            row[i] = channel < 0 ? 0.0f : job.x[t * job.x_step + channel];
        }
        fill_row(left, static_cast<int>(t), depth, row);
    }, crew);

    const int most = panel_depth(depth, half) / CHANNELS;  // groups of one panel
    parallel_for(w.columns / PANEL, [&](int64_t item, int thread) {
        char* panel = panels + thread * each;
        for (int first = 0; first < w.count; first += most) {
            const int count = static_cast<int>(w.count) - first < most ? static_cast<int>(w.count) - first : most;
            const size_t stripe = static_cast<size_t>(count) * CHANNELS * (half ? 32 : 64);
            for (int g = 0; g < count; ++g)
                kernels().pack_channels(w.at(first + g), w.fine, item * PANEL, job.ratio, half,
                                        panel + g * (stripe / count), stripe);
            for (int t = 0; t < job.tokens; t += TILE) {
                const int rows = job.tokens - t < TILE ? job.tokens - t : TILE;
                float* out[TILE];
                for (int m = 0; m < rows; ++m) out[m] = job.sums + (t + m) * job.sums_step + item * PANEL;
                kernels().tile(half, rows, left.at(t, first * CHANNELS), left.step, panel, stripe, count * CHANNELS,
                               out, true);
            }
        }
    }, crew);
}

void gemm_down(const DownJob& job, void* memory, int crew) {
    const int neurons = static_cast<int>(job.rows.bundles);
    const bool half = use_half(job.rows.codec);
    Memory scratch{reinterpret_cast<char*>(aligned(reinterpret_cast<size_t>(memory)))};
    const Left h{scratch.take(job.tokens * left_step(neurons) * (half ? 2 : 4)), left_step(neurons), half};
    const size_t sums_bytes = aligned(static_cast<size_t>(job.tokens) * PANEL * 4);
    const size_t along = static_cast<size_t>(neurons + 1) * PANEL * (half ? 2 : 4);
    const size_t each = aligned(panel_bytes() > along ? panel_bytes() : along);
    char* sums = scratch.take(crew * sums_bytes);
    char* panels = scratch.take(crew * each);
    parallel_for(job.tokens, [&](int64_t t, int thread) {
        float* row = reinterpret_cast<float*>(panels + thread * each);  // not in use yet
        activations(job, static_cast<int>(t), job.first, neurons, row, row + neurons);
        fill_row(h, static_cast<int>(t), neurons, row);
    }, crew);
    multiply_down(job.rows, h, job.tokens, panels, each, sums, sums_bytes,
                  [&](int t) { return job.y + t * job.y_step; }, crew);
}

}  // namespace flashrt
