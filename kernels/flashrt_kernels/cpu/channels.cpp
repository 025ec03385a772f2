// Feed-forward blocks whose gate and up projections lie by input channel: a token leaves out channels whose x is small,
// and neurons whose h is.

#include <cmath>
#include <cstring>

#include "ops.h"
#include "tokens.h"
#include "turnstile.h"

namespace flashrt {

// h of `count` neurons from `first` on, of one token: act(gate) * up.
void hidden(const DownJob& job, int token, int64_t first, int count, float* h, float* up) {
    const float* sums = job.sums + token * job.sums_step;
    for (int i = 0; i < count; ++i) h[i] = sums[first + i] * job.scale[first + i];
    if (job.gated)
        for (int i = 0; i < count; ++i) up[i] = sums[job.padded + first + i] * job.scale[job.padded + first + i];
    if (job.up_bias)
        for (int i = 0; i < count; ++i) h[i] += job.up_bias[first + i];
    kernels().activate(job.activation, h, job.gated ? up : nullptr, count);
}

namespace {

constexpr int ITEMS = 4;  // pieces of work for each thread
constexpr int UNIT = 512;  // neurons that one thread sums before y takes them: calls cut at multiples of it agree

// Which of a group's channels a token wants, and its x with zeros for the others.
void weigh(const GateUpJob& job, const float* x, int64_t group, float* kept, uint8_t* wanted) {
    for (int i = 0; i < CHANNELS; ++i) {
        const int32_t channel = job.order[group * CHANNELS + i];
        const float value = channel < 0 ? 0.0f : x[channel];
        const float weight = channel < 0 ? -1.0f : std::fabs(value) * job.norms[channel];
        wanted[i] = weight < job.coarse_from ? 0 : weight < job.fine_from || i >= job.groups.fine ? 1 : 2;
        if (channel < 0) wanted[i] = 0;
        if (std::isnan(weight)) wanted[i] = 2;  // what is not a number must not vanish
        kept[i] = wanted[i] ? value : 0.0f;
    }
}

void gate_up_batch(const GateUpJob& job, int first, int tokens, ChannelCount& total) {
    const ChannelGroups& w = job.groups;
    auto* active = static_cast<ActiveChannels*>(scratch(0, sizeof(ActiveChannels) * tokens * w.count));
    for (int t = 0; t < tokens; ++t)
        for (int64_t g = 0; g < w.count; ++g) {
            alignas(64) float kept[CHANNELS];
            uint8_t wanted[CHANNELS];
            weigh(job, job.x + (first + t) * job.x_step, w.first + g, kept, wanted);
            ActiveChannels& a = active[t * w.count + g];
            kernels().choose_channels(kept, wanted, a);
            total.coarse += a.count[0];
            total.fine += a.count[1];
        }
    const int tiles = static_cast<int>(w.columns / TILE_COLUMNS);
    const int each = tiles / (ITEMS * threads()) + 1;
    parallel_for((tiles + each - 1) / each, [&](int64_t item, int) {
        const int from = static_cast<int>(item) * each, to = tiles - from < each ? tiles : from + each;
        for (int64_t g = 0; g < w.count; ++g) {
            const ChannelGroup group = w.at(g), next = w.at(g + 1 < w.count ? g + 1 : g);
            for (int t = 0; t < tokens; ++t) {
                const ActiveChannels* a = active + t * w.count + g;
                if (a->count[0] == 0) continue;
                const bool more = g + 1 < w.count;
                kernels().add_channels(group, *a, more ? &next : nullptr, more ? a + 1 : nullptr, from, to, job.ratio,
                                       job.sums + (first + t) * job.sums_step);
            }
        }
    });
}

// Adds the neurons of [first, last) whose |h| * norm reaches the threshold to sums; how many that were.
int down_unit(const DownJob& job, int token, int64_t first, int64_t last, float* sums) {
    float h[UNIT], up[UNIT];
    int16_t chosen[UNIT];
    const int count = static_cast<int>(last - first);
    hidden(job, token, job.first + first, count, h, up);
    int kept = 0;
    for (int i = 0; i < count; ++i) {
        chosen[kept] = static_cast<int16_t>(i);
        kept += !(std::fabs(h[i]) * job.norms[job.first + first + i] < job.from);
    }
    for (int begin = 0; begin < kept; begin += GATHER) {
        const int n = kept - begin < GATHER ? kept - begin : GATHER;
        const uint8_t *at[GATHER], *next[GATHER];
        float factors[GATHER];
        for (int i = 0; i < n; ++i) {
            const int neuron = chosen[begin + i], then = chosen[begin + GATHER + i < kept ? begin + GATHER + i : begin + i];
            at[i] = job.rows.data + (first + neuron) * job.rows.stride;
            next[i] = job.rows.data + (first + then) * job.rows.stride;
            factors[i] = h[neuron];
        }
        kernels().axpys(job.rows.codec, {at, next, n, 1}, 0, job.rows.k, factors, GATHER, 1, sums,
                        sums_step(job.rows.k));
    }
    return kept;
}

}  // namespace

ChannelCount gate_up(const GateUpJob& job) {
    ChannelCount total;
    for (int i = 0; i < job.tokens; i += BATCH)
        gate_up_batch(job, i, job.tokens - i < BATCH ? job.tokens - i : BATCH, total);
    return total;
}

int64_t down(const DownJob& job) {
    const int k = job.rows.k, crew = threads();
    const size_t step = sums_step(k);
    float* all_sums = static_cast<float*>(scratch(1, sizeof(float) * step * crew));
    int64_t kept = 0;
    for (int token = 0; token < job.tokens; ++token) {
        Turnstile turnstile;
        parallel_for((job.rows.bundles + UNIT - 1) / UNIT, [&](int64_t item, int thread) {
            const int64_t from = item * UNIT, to = job.rows.bundles - from < UNIT ? job.rows.bundles : from + UNIT;
            float* sums = all_sums + thread * step;
            std::memset(sums, 0, sizeof(float) * step);
            const int count = down_unit(job, token, from, to, sums);
            turnstile.enter(item);
            if (count) kernels().collect(job.rows.codec, sums, k, job.y + token * job.y_step);
            kept += count;
            turnstile.leave(item);
        }, crew);
    }
    return kept;
}

}  // namespace flashrt
