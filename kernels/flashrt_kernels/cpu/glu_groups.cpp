// Neurons in bundles of a group, whose down is stored along the neurons: its products are dots like any other.

#include <cmath>
#include <cstring>

#include "ops.h"
#include "tokens.h"

namespace flashrt {
namespace {

constexpr int PIECE = LARGEST_GROUP;  // neurons whose h is kept between the two halves of the work
constexpr int STRIP = 32;     // neurons that a thread takes at once: their h share a scale
constexpr int OUTPUTS = 64;   // output channels that a thread takes at once
constexpr size_t AHEAD = 8192;  // bytes

static_assert(PIECE % STRIP == 0);

// Bundles [first, first + count) of those that take part, and the h of their neurons.
struct Piece {
    int64_t first;
    int count;
    float* values;  // [tokens, PIECE]
    Tokens h;       // the same, rounded
};

// gate·x and up·x of one strip of a bundle, then act(gate) * up, into h [tokens, PIECE] from `at` on.
void strip(const GluJob& job, const Tokens& tokens, const float* factors, int64_t bundle, int from, int at, float* h) {
    const Kernels& kernel = kernels();
    const Neurons& w = job.neurons;
    const uint8_t* base = job.bundle(bundle);
    float both[2][NARROW_TOKENS * STRIP];  // gate, up
    auto dots = [&](Codec codec, size_t offset, float* out) {
        const uint8_t* rows = base + offset + from * row_bytes(codec, w.k);
        const uint8_t* next = rows + AHEAD;
        kernel.dots(codec, {&rows, &next, 1, STRIP}, tokens, {out, 0, 1, STRIP});
    };
    if (w.gated) dots(w.gate, 0, both[0]);
    dots(w.up, w.up_at(), both[w.gated]);
    for (int t = 0; t < tokens.count; ++t) {
        float* row = both[0] + t * STRIP;
        float* up = w.gated ? both[1] + t * STRIP : nullptr;
        job.finish(bundle * w.group + from, STRIP, row, up, factors ? factors + t : nullptr);
        std::memcpy(h + t * PIECE + at, row, sizeof(float) * STRIP);
    }
}

// The h of one bundle of a piece, whose neurons begin at `from`.
Tokens part(const Tokens& h, int from, int group) {
    Tokens own = h;
    own.k = group;
    own.kp = padded(group);
    own.f += from / 4;  // as integers: see prepare_kept
    own.q = reinterpret_cast<int16_t*>(reinterpret_cast<int8_t*>(h.q) + from);
    own.scales += from / h.each;
    own.sums += from / SPAN_WEIGHTS * 32;
    return own;
}

// y += down of the neurons of a piece, for some output channels, bundle by bundle.
void outputs(const GluJob& job, const Piece& piece, int first, int count, float* const* y) {
    const Neurons& w = job.neurons;
    const size_t offset = w.down_at() + first * row_bytes(w.down, w.group);
    float sums[NARROW_TOKENS * OUTPUTS];
    for (int b = 0; b < piece.count; ++b) {
        const uint8_t* rows = job.bundle(piece.first + b) + offset;
        const uint8_t* next = b + 1 < piece.count ? job.bundle(piece.first + b + 1) + offset : rows;
        const Tokens h = part(piece.h, b * w.group, w.group);
        kernels().dots(w.down, {&rows, &next, 1, count}, h, {sums, 0, 1, OUTPUTS});
        for (int t = 0; t < h.count; ++t)
            for (int r = 0; r < count; ++r) y[t][first + r] += sums[t * OUTPUTS + r];
    }
}

void take(const GluJob& job, const Tokens& tokens, const float* factors, Piece& piece, float* const* y) {
    const Neurons& w = job.neurons;
    const int strips = w.group / STRIP, neurons = piece.count * w.group, rounded = piece.h.each;
    parallel_for(piece.count * strips, [&](int64_t item, int) {
        const int from = static_cast<int>(item % strips) * STRIP;
        strip(job, tokens, factors, piece.first + item / strips, from, static_cast<int>(item) * STRIP, piece.values);
    });
    for (int t = 0; t < tokens.count && job.usage; ++t)
        for (int i = 0; i < neurons; ++i)
            job.usage[piece.first + i / w.group] += std::fabs(piece.values[t * PIECE + i]);
    const int parts = neurons / rounded;
    parallel_for(static_cast<int64_t>(parts) * tokens.count, [&](int64_t item, int) {
        const int t = static_cast<int>(item / parts), at = static_cast<int>(item % parts) * rounded;
        kernels().prepare_kept(piece.values + t * PIECE + at, at, rounded, t, piece.h);
    });
    parallel_for((w.k + OUTPUTS - 1) / OUTPUTS, [&](int64_t item, int) {
        const int first = static_cast<int>(item) * OUTPUTS;
        outputs(job, piece, first, w.k - first < OUTPUTS ? w.k - first : OUTPUTS, y);
    });
}

size_t piece_bytes() { return tokens_bytes(NARROW_TOKENS, PIECE) + sizeof(float) * NARROW_TOKENS * PIECE; }

// The most numbers of h that may share a scale: those of one bundle, whatever lies beside it.
int shared(int group) { return group % 256 == 0 ? 256 : group % 128 == 0 ? 128 : 64; }

void batch(const GluJob& job, int first, int count) {
    const Neurons& w = job.neurons;
    Tokens tokens = tokens_in(scratch(0, tokens_bytes(NARROW_TOKENS, w.k)), count, w.k);
    float* y[NARROW_TOKENS];
    for (int i = 0; i < count; ++i) {
        const int64_t token = job.chosen ? job.chosen[first + i] : first + i;
        kernels().prepare(w.up, job.x + token * job.x_step, i, tokens);
        y[i] = job.y + token * job.y_step;
    }
    const int most = PIECE / w.group;
    for (int64_t bundle = 0; bundle < job.count; bundle += most) {
        const int64_t left = job.count - bundle;
        auto* values = static_cast<float*>(scratch(1, piece_bytes()));
        Piece piece{bundle, static_cast<int>(left < most ? left : most), values,
                    tokens_in(values + NARROW_TOKENS * PIECE, count, PIECE)};
        piece.h.each = shared(w.group);
        take(job, tokens, job.factors ? job.factors + first : nullptr, piece, y);
    }
}

// y += some rows · the h of a piece, `from` numbers into a row, bundle by bundle.
void add_rows(const AddJob& job, const Tokens& h, int from, int numbers, int64_t first, int count) {
    const Rows& w = job.weights;
    const size_t bytes = row_bytes(w.codec, job.group);
    const uint8_t *at[GATHER], *next[GATHER];
    float sums[NARROW_TOKENS * GATHER];
    for (int i = 0; i < count; ++i) at[i] = w.data + (first + i) * w.stride + row_bytes(w.codec, from);
    for (int b = 0; b < numbers; b += job.group) {
        for (int i = 0; i < count; ++i) next[i] = b + job.group < numbers ? at[i] + bytes : at[i];
        kernels().dots(w.codec, {at, next, count, 1}, part(h, b, job.group), {sums, 1, 0, GATHER});
        for (int t = 0; t < h.count; ++t)
            for (int i = 0; i < count; ++i) job.to(t)[first + i] += sums[t * GATHER + i];
        for (int i = 0; i < count; ++i) at[i] += bytes;
    }
}

void add_batch(const AddJob& job) {
    const int most = PIECE / job.group * job.group, rounded = shared(job.group);
    for (int from = 0; from < job.weights.k; from += most) {
        const int numbers = job.weights.k - from < most ? job.weights.k - from : most, parts = numbers / rounded;
        Tokens h = tokens_in(scratch(1, piece_bytes()), job.tokens, PIECE);
        h.each = rounded;
        parallel_for(static_cast<int64_t>(parts) * job.tokens, [&](int64_t item, int) {
            const int t = static_cast<int>(item / parts), at = static_cast<int>(item % parts) * rounded;
            kernels().prepare_kept(job.x + t * job.x_step + from + at, at, rounded, t, h);
        });
        parallel_for((job.weights.bundles + GATHER - 1) / GATHER, [&](int64_t item, int) {
            const int64_t first = item * GATHER, left = job.weights.bundles - first;
            add_rows(job, h, from, numbers, first, static_cast<int>(left < GATHER ? left : GATHER));
        });
    }
}

}  // namespace

void linear_add(const AddJob& job) {
    for (int i = 0; i < job.tokens; i += NARROW_TOKENS) {
        AddJob part = job;
        part.x += i * job.x_step;
        part.tokens = job.tokens - i < NARROW_TOKENS ? job.tokens - i : NARROW_TOKENS;
        if (job.chosen) part.chosen += i;
        else part.y += i * job.y_step;
        add_batch(part);
    }
}

void glu_groups(const GluJob& job) {
    for (int i = 0; i < job.tokens; i += NARROW_TOKENS)
        batch(job, i, job.tokens - i < NARROW_TOKENS ? job.tokens - i : NARROW_TOKENS);
}

size_t reserve_groups() {
    std::memset(scratch(1, piece_bytes()), 0, piece_bytes());
    return piece_bytes();
}

}  // namespace flashrt
