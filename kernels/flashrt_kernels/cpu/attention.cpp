// Attention over an append-only cache, in segments of 256 positions that are merged in ascending order.

#include "ops.h"
#include "partial.h"
#include "pool.h"

namespace flashrt {
namespace {

constexpr int WAVE = 8;      // segments of one KV head that run in parallel before they are merged
constexpr int QUERIES = 96;  // rows of the largest tile, about

int tile_tokens(int group) { return QUERIES / group > 1 ? QUERIES / group : 1; }

struct Shape {
    int group, dim16, values16, tile, queries;  // queries: of a full tile
    Shape(int tokens, int heads, int kv_heads, int dim, int values) {
        group = heads / kv_heads;
        dim16 = rounded(dim);
        values16 = rounded(values);
        tile = tile_tokens(group) < tokens ? tile_tokens(group) : tokens;
        queries = tile * group;
    }
    size_t partial() const { return partial_floats(queries, values16); }
    size_t worker(int dim) const {  // panel, scores, queries, bounds, a partial and the running one
        return static_cast<size_t>(POSITIONS) * dim16 + static_cast<size_t>(SCORES) * queries + static_cast<size_t>(queries) * (dim + 2) +
               2 * partial() + 64;
    }
};

struct Worker {
    float *panel, *scores, *q;
    int *first, *last;
    Partial fresh, running;
    Worker(float* memory, const Shape& shape, int dim) {
        panel = memory;
        scores = panel + static_cast<size_t>(POSITIONS) * shape.dim16;
        q = scores + static_cast<size_t>(SCORES) * shape.queries;
        first = reinterpret_cast<int*>(q + static_cast<size_t>(shape.queries) * dim);
        last = first + shape.queries;
        float* rest = reinterpret_cast<float*>(last + shape.queries);
        fresh = partial_at(rest, shape.queries);
        running = partial_at(rest + shape.partial(), shape.queries);
    }
};

struct Tile {  // consecutive tokens against one KV head
    int token, tokens, head;
};

int first_visible(const AttentionJob& job, int position) {
    return job.window > 0 && position - job.window + 1 > 0 ? position - job.window + 1 : 0;
}

int position(const AttentionJob& job, int token) {
    if (job.page) return job.start;
    return job.start + (job.tree ? job.tree->depth[token] : token);
}

// The first and the last position that some token of the tile sees.
void visible(const AttentionJob& job, const Tile& tile, int& low, int& high) {
    low = high = position(job, tile.token);
    for (int t = 1; t < tile.tokens; ++t) {
        const int at = position(job, tile.token + t);
        if (at < low) low = at;
        if (at > high) high = at;
    }
    low = first_visible(job, low);
}

// Which positions the tile sees of segment `index`, and the slots that they lie in.
void place(const AttentionJob& job, const Tile& tile, int index, Segment& s) {
    int low, high;
    visible(job, tile, low, high);
    const int begin = index * ATTENTION_SEGMENT, end = high + 1 < begin + ATTENTION_SEGMENT ? high + 1 : begin + ATTENTION_SEGMENT;
    s.origin = s.begin = low > begin ? low / 32 * 32 : begin;  // what AMX multiplies at a time
    s.end = end;
    s.lanes = end - s.origin;
    if (!job.tree || end <= job.start) return;
    s.tree = job.tree;
    s.start = job.start;
    s.begin = s.origin < job.start ? s.origin : job.start;
    s.end = job.start + job.tree->nodes;
}

// Partial softmax of the tile over segment `index`.
void attend(const AttentionJob& job, const Shape& shape, const Tile& tile, int index, Worker& worker, Partial& out) {
    Segment s{};
    place(job, tile, index, s);
    s.token = tile.token;
    s.group = shape.group;
    s.hold(job.codecs, job.dim, job.values);
    s.kv = static_cast<const char*>(job.kv) + static_cast<size_t>(tile.head) * job.context * s.pair_bytes;
    s.queries = tile.tokens * shape.group;
    for (int t = 0, i = 0; t < tile.tokens; ++t)
        for (int g = 0; g < shape.group; ++g, ++i) {
            const int last = position(job, tile.token + t);
            const float* from = job.q + (tile.token + t) * job.q_step +
                                static_cast<size_t>(tile.head * shape.group + g) * job.dim;
            for (int d = 0; d < job.dim; ++d) worker.q[static_cast<size_t>(i) * job.dim + d] = from[d] * job.scale;
            worker.first[i] = first_visible(job, last);
            worker.last[i] = last;
        }
    s.q = worker.q;
    s.first = worker.first;
    s.last = worker.last;
    s.softcap = job.softcap;
    s.wide = job.wide;
    s.panel = worker.panel;
    s.scores = worker.scores;
    s.best = out.best;
    s.total = out.total;
    s.acc = out.acc;
    kernels().attend(s);
}

float* state_of(const AttentionJob& job, const Shape& shape, const Tile& tile, int query) {
    const int token = tile.token + query / shape.group, head = tile.head * shape.group + query % shape.group;
    return job.state + token * job.state_step + static_cast<size_t>(head) * (shape.values16 + 2);
}

// What the tile's queries begin with: nothing, their sinks, or what they have seen of earlier positions.
void begin(const AttentionJob& job, const Shape& shape, const Tile& tile, Partial& p) {
    for (int i = 0; i < tile.tokens * shape.group; ++i) {
        if (!job.state || job.empty) {
            clear(p, i, shape.values16, job.sinks ? job.sinks + tile.head * shape.group + i % shape.group : nullptr);
            continue;
        }
        const float* from = state_of(job, shape, tile, i);
        p.best[i] = from[0];
        p.total[i] = from[1];
        std::memcpy(p.acc + static_cast<size_t>(i) * shape.values16, from + 2, sizeof(float) * shape.values16);
    }
}

void keep(const AttentionJob& job, const Shape& shape, const Tile& tile, const Partial& p) {
    for (int i = 0; i < tile.tokens * shape.group; ++i) {
        float* to = state_of(job, shape, tile, i);
        to[0] = p.best[i];
        to[1] = p.total[i];
        std::memcpy(to + 2, p.acc + static_cast<size_t>(i) * shape.values16, sizeof(float) * shape.values16);
    }
}

void write(const AttentionJob& job, const Shape& shape, const Tile& tile, const Partial& p) {
    if (job.page) return keep(job, shape, tile, p);
    for (int t = 0, i = 0; t < tile.tokens; ++t)
        for (int g = 0; g < shape.group; ++g, ++i) {
            float* to = job.out + (tile.token + t) * job.out_step +
                        static_cast<size_t>(tile.head * shape.group + g) * job.values;
            const float* from = p.acc + static_cast<size_t>(i) * shape.values16;
            const float scale = 1.0f / p.total[i];
            for (int d = 0; d < job.values; ++d) to[d] = from[d] * scale;
        }
}

void segments(const AttentionJob& job, const Tile& tile, int& first, int& last) {
    int low, high;
    visible(job, tile, low, high);
    first = low / ATTENTION_SEGMENT;
    last = high / ATTENTION_SEGMENT;
}

size_t wave_floats(const Shape& shape, int kv_heads) { return (WAVE + 1) * shape.partial() * kv_heads; }

// One tile of tokens, few KV heads: segments run in parallel too.
void by_segment(const AttentionJob& job, const Shape& shape, float* workers, float* partials) {
    const int queries = job.tokens * shape.group;
    int first, last;
    segments(job, {0, job.tokens, 0}, first, last);
    auto partial = [&](int head, int i) {
        return partial_at(partials + (static_cast<size_t>(head) * (WAVE + 1) + i) * shape.partial(), shape.queries);
    };
    for (int from = first; from <= last; from += WAVE) {
        const int count = last - from + 1 < WAVE ? last - from + 1 : WAVE;
        parallel_for(static_cast<int64_t>(job.kv_heads) * count, [&](int64_t item, int thread) {
            const int head = static_cast<int>(item) / count, i = static_cast<int>(item) % count;
            Worker worker(workers + thread * shape.worker(job.dim), shape, job.dim);
            Partial p = partial(head, i);
            attend(job, shape, {0, job.tokens, head}, from + i, worker, p);
        }, job.crew);
        parallel_for(job.kv_heads, [&](int64_t head, int) {
            Partial running = partial(static_cast<int>(head), WAVE);
            if (from == first) begin(job, shape, {0, job.tokens, static_cast<int>(head)}, running);
            for (int i = 0; i < count; ++i) merge(shape.values16, queries, running, partial(static_cast<int>(head), i));
            if (from + WAVE > last) write(job, shape, {0, job.tokens, static_cast<int>(head)}, running);
        });
    }
}

void by_tile(const AttentionJob& job, const Shape& shape, float* workers) {
    const int tiles = (job.tokens + shape.tile - 1) / shape.tile;
    parallel_for(static_cast<int64_t>(tiles) * job.kv_heads, [&](int64_t item, int thread) {
        // Heaviest tiles first, so that the threads end together.
        const int token = (tiles - 1 - static_cast<int>(item) / job.kv_heads) * shape.tile;
        const Tile tile{token, job.tokens - token < shape.tile ? job.tokens - token : shape.tile,
                        static_cast<int>(item) % job.kv_heads};
        Worker worker(workers + thread * shape.worker(job.dim), shape, job.dim);
        const int queries = tile.tokens * shape.group;
        begin(job, shape, tile, worker.running);
        int first, last;
        segments(job, tile, first, last);
        for (int i = first; i <= last; ++i) {
            attend(job, shape, tile, i, worker, worker.fresh);
            merge(shape.values16, queries, worker.running, worker.fresh);
        }
        write(job, shape, tile, worker.running);
    }, job.crew);
}

}  // namespace

int attention_state_width(int values) { return rounded(values) + 2; }

size_t attention_scratch_bytes(int tokens, int heads, int kv_heads, int dim, int crew) {
    const Shape shape(tokens, heads, kv_heads, dim, dim);
    const bool one_tile = tokens <= shape.tile;
    return 64 + sizeof(float) * (crew * shape.worker(dim) + (one_tile ? wave_floats(shape, kv_heads) : 0));
}

void attention(const AttentionJob& job) {
    const Shape shape(job.tokens, job.heads, job.kv_heads, job.dim, job.values);
    float* workers = reinterpret_cast<float*>((reinterpret_cast<size_t>(job.scratch) + 63) / 64 * 64);
    if (job.tokens <= shape.tile) by_segment(job, shape, workers, workers + job.crew * shape.worker(job.dim));
    else by_tile(job, shape, workers);
}

}  // namespace flashrt
