// Attention over lists of tokens, one for each row and KV head, in segments of 256 that are merged in order.

#include "ops.h"
#include "partial.h"
#include "pool.h"

namespace flashrt {
namespace {

constexpr int WAVE = 128;  // segments of all lists that run in parallel before they are merged, about

struct Shape {
    int group, dim, dim16, values16, lists, wave;  // wave: segments of each list

    Shape(int tokens, int heads, int kv_heads, int dim, int values)
        : group(heads / kv_heads), dim(dim), dim16(rounded(dim)), values16(rounded(values)), lists(tokens * kv_heads),
          wave(lists < WAVE ? WAVE / lists : 1) {}
    size_t partial() const { return partial_floats(group, values16); }
    size_t worker() const {  // pairs, panel, scores, queries and bounds, in floats
        return 2 * static_cast<size_t>(ATTENTION_SEGMENT + POSITIONS) + static_cast<size_t>(POSITIONS) * dim16 +
               static_cast<size_t>(SCORES) * group + static_cast<size_t>(group) * (dim + 2) + 16;
    }
    size_t floats(int crew) const { return crew * ((worker() + 15) / 16 * 16) + lists * (wave + 1) * partial(); }
};

struct Worker {
    const void** pairs;
    float *panel, *scores, *q;
    int *first, *last;

    Worker(float* memory, const Shape& shape) {
        pairs = reinterpret_cast<const void**>(memory);
        panel = memory + 2 * (ATTENTION_SEGMENT + POSITIONS);
        scores = panel + static_cast<size_t>(POSITIONS) * shape.dim16;
        q = scores + static_cast<size_t>(SCORES) * shape.group;
        first = reinterpret_cast<int*>(q + static_cast<size_t>(shape.group) * shape.dim);
        last = first + shape.group;
    }
};

struct Piece {  // a segment of one list
    int token, head;
    const int32_t* list;
    int count;
};

int segments(int count) { return (count + ATTENTION_SEGMENT - 1) / ATTENTION_SEGMENT; }

Piece piece_of(const AttentionListJob& job, int list, int segment) {
    const int from = segment * ATTENTION_SEGMENT, left = job.counts[list] - from;
    return {list / job.kv_heads, list % job.kv_heads, job.lists + list * job.most + from,
            left < ATTENTION_SEGMENT ? left : ATTENTION_SEGMENT};
}

// Where the piece's keys and values lie; behind the last, what is there to be fetched ahead is the last again.
void point(const AttentionListJob& job, const Piece& piece, const void** pairs) {
    const size_t bytes = kv_pair_bytes(job.codecs, job.dim);
    const char* near = static_cast<const char*>(job.near) + static_cast<size_t>(piece.head) * job.slots * bytes;
    const char* far = static_cast<const char*>(job.far);
    for (int i = 0; i < piece.count; ++i) {
        const int64_t at = piece.list[i];
        pairs[i] = at >= 0 ? near + at * bytes : far + (-1 - at) * bytes;
    }
    for (int i = 0; i < POSITIONS; ++i) pairs[piece.count + i] = pairs[piece.count - 1];
}

void attend(const AttentionListJob& job, const Shape& shape, const Piece& piece, Worker& worker, Partial& out) {
    point(job, piece, worker.pairs);
    const float* from = job.q + piece.token * job.q_step + static_cast<size_t>(piece.head) * shape.group * job.dim;
    for (int i = 0; i < shape.group * job.dim; ++i) worker.q[i] = from[i] * job.scale;
    for (int g = 0; g < shape.group; ++g) {
        worker.first[g] = 0;
        worker.last[g] = piece.count - 1;
    }
    Segment s{};
    s.pairs = worker.pairs;
    s.hold(job.codecs, job.dim, job.values);
    s.end = s.lanes = piece.count;
    s.group = s.queries = shape.group;
    s.q = worker.q;
    s.first = worker.first;
    s.last = worker.last;
    s.softcap = job.softcap;
    s.panel = worker.panel;
    s.scores = worker.scores;
    s.best = out.best;
    s.total = out.total;
    s.acc = out.acc;
    kernels().attend(s);
}

void write(const AttentionListJob& job, const Shape& shape, int list, const Partial& p) {
    float* to = job.out + list / job.kv_heads * job.out_step +
                static_cast<size_t>(list % job.kv_heads) * shape.group * job.values;
    for (int g = 0; g < shape.group; ++g, to += job.values) {
        const float scale = job.counts[list] ? 1.0f / p.total[g] : 0.0f;
        for (int d = 0; d < job.values; ++d) to[d] = p.acc[static_cast<size_t>(g) * shape.values16 + d] * scale;
    }
}

}  // namespace

size_t attention_list_scratch_bytes(int tokens, int heads, int kv_heads, int dim, int crew) {
    return 64 + sizeof(float) * Shape(tokens, heads, kv_heads, dim, dim).floats(crew);
}

void attention_list(const AttentionListJob& job) {
    const Shape shape(job.tokens, job.heads, job.kv_heads, job.dim, job.values);
    float* workers = reinterpret_cast<float*>((reinterpret_cast<size_t>(job.scratch) + 63) / 64 * 64);
    const size_t worker_step = (shape.worker() + 15) / 16 * 16;
    float* partials = workers + job.crew * worker_step;
    auto partial = [&](int list, int i) {
        return partial_at(partials + (static_cast<size_t>(list) * (shape.wave + 1) + i) * shape.partial(), shape.group);
    };
    int longest = 1;
    for (int list = 0; list < shape.lists; ++list)
        if (segments(job.counts[list]) > longest) longest = segments(job.counts[list]);
    for (int from = 0; from < longest; from += shape.wave) {
        const int wave = longest - from < shape.wave ? longest - from : shape.wave;
        parallel_for(static_cast<int64_t>(shape.lists) * wave, [&](int64_t item, int thread) {
            const int list = static_cast<int>(item) / wave, i = static_cast<int>(item) % wave;
            if (from + i >= segments(job.counts[list])) return;
            Worker worker(workers + thread * worker_step, shape);
            Partial p = partial(list, i);
            attend(job, shape, piece_of(job, list, from + i), worker, p);
        }, job.crew);
        parallel_for(shape.lists, [&](int64_t item, int) {
            const int list = static_cast<int>(item);
            Partial running = partial(list, shape.wave);
            const float* sinks = job.sinks ? job.sinks + list % job.kv_heads * shape.group : nullptr;
            for (int g = 0; from == 0 && g < shape.group; ++g) clear(running, g, shape.values16, sinks ? sinks + g : nullptr);
            for (int i = 0; i < wave && from + i < segments(job.counts[list]); ++i)
                merge(shape.values16, shape.group, running, partial(list, i));
            if (from + wave >= longest) write(job, shape, list, running);
        });
    }
}

}  // namespace flashrt
