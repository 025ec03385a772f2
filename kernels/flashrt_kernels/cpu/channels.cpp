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
constexpr int UNIT = DOWN_STEP;  // neurons that one thread sums before y takes them

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
    const int tiles = static_cast<int>(w.columns / TILE_COLUMNS), crew = threads();
    const int items = tiles < ITEMS * crew ? tiles : ITEMS * crew;
    const auto begin = [&](int64_t item) { return static_cast<int>(item * tiles / items); };
    parallel_for(items, [&](int64_t item, int) {
        const int from = begin(item), to = begin(item + 1);
        const int then = item + crew < items ? begin(item + crew) : from;  // where this thread will probably go on
        for (int64_t g = 0; g < w.count; ++g) {
            const bool more = g + 1 < w.count;
            const ChannelGroup group = w.at(g), next = more ? w.at(g + 1) : w.at(0).from_tile(then - from);
            for (int t = 0; t < tokens; ++t) {
                const ActiveChannels* a = active + t * w.count;
                if (a[g].count[0] == 0) continue;
                kernels().add_channels(group, a[g], next, a[more ? g + 1 : 0], from, to, job.ratio,
                                       job.sums + (first + t) * job.sums_step);
            }
        }
    }, crew);
}

// The neurons of one token that take part, unit by unit: `chosen` has those of unit i from i * UNIT on, ascending.
struct Chosen {
    float* h;         // [bundles], of all neurons
    int32_t* neuron;  // [bundles]
    int32_t* count;   // [units]

    static size_t bytes(int64_t bundles) { return sizeof(int32_t) * (2 * bundles + bundles / UNIT + 1); }
};

Chosen chosen_in(void* memory, int64_t bundles) {
    auto* h = static_cast<float*>(memory);
    auto* neuron = reinterpret_cast<int32_t*>(h + bundles);
    return {h, neuron, neuron + bundles};
}

// Computes h, and finds the neurons of a unit whose |h| * norm reaches the threshold.
void choose(const DownJob& job, int token, int64_t unit, const Chosen& out) {
    const int64_t first = unit * UNIT, left = job.rows.bundles - first;
    const int count = static_cast<int>(left < UNIT ? left : UNIT);
    float up[UNIT];
    hidden(job, token, job.first + first, count, out.h + first, up);
    int kept = 0;
    for (int64_t i = first; i < first + count; ++i) {
        out.neuron[first + kept] = static_cast<int32_t>(i);
        kept += !(std::fabs(out.h[i]) * job.norms[job.first + i] < job.from);
    }
    out.count[unit] = kept;
}

// sums += the chosen neurons of a unit; those of unit `then`, or of none if it is beyond the last, are fetched ahead.
void down_unit(const DownJob& job, const Chosen& chosen, int64_t unit, int64_t then, float* sums) {
    const int32_t *neuron = chosen.neuron + unit * UNIT, *after = chosen.neuron + then * UNIT;
    const int kept = chosen.count[unit], others = then * UNIT < job.rows.bundles ? chosen.count[then] : 0;
    const auto row = [&](int32_t i) { return job.rows.data + i * job.rows.stride; };
    for (int begin = 0; begin < kept; begin += GATHER) {
        const int n = kept - begin < GATHER ? kept - begin : GATHER;
        const uint8_t *at[GATHER], *next[GATHER];
        float factors[GATHER];
        for (int i = 0; i < n; ++i) {
            const int ahead = begin + GATHER + i, beyond = ahead - (kept + GATHER - 1) / GATHER * GATHER;
            at[i] = row(neuron[begin + i]);
            next[i] = ahead < kept                       ? row(neuron[ahead])
                      : beyond >= 0 && beyond < others ? row(after[beyond])
                                                         : at[i];
            factors[i] = chosen.h[neuron[begin + i]];
        }
        kernels().axpys(job.rows.codec, {at, next, n, 1}, 0, job.rows.k, factors, GATHER, 1, sums,
                        sums_step(job.rows.k));
    }
}

}  // namespace

ChannelCount gate_up(const GateUpJob& job) {
    ChannelCount total;
    for (int i = 0; i < job.tokens; i += NARROW_TOKENS)
        gate_up_batch(job, i, job.tokens - i < NARROW_TOKENS ? job.tokens - i : NARROW_TOKENS, total);
    return total;
}

int64_t down(const DownJob& job) {
    const int k = job.rows.k, crew = threads();
    const int64_t units = (job.rows.bundles + UNIT - 1) / UNIT;
    const Chosen chosen = chosen_in(scratch(0, Chosen::bytes(job.rows.bundles)), job.rows.bundles);
    const size_t step = sums_step(k);
    float* all_sums = static_cast<float*>(scratch(1, sizeof(float) * step * crew));
    int64_t kept = 0;
    for (int token = 0; token < job.tokens; ++token) {
        parallel_for(units, [&](int64_t unit, int) { choose(job, token, unit, chosen); }, crew);
        Turnstile turnstile;
        parallel_for(units, [&](int64_t unit, int thread) {
            float* sums = all_sums + thread * step;
            std::memset(sums, 0, sizeof(float) * step);
            down_unit(job, chosen, unit, unit + crew, sums);
            turnstile.enter(unit);
            if (chosen.count[unit]) kernels().collect(job.rows.codec, 1, sums, k, job.y + token * job.y_step);
            kept += chosen.count[unit];
            turnstile.leave(unit);
        }, crew);
    }
    return kept;
}

}  // namespace flashrt
