// The blocks of tokens that a row attends to, by their labels: rows one after the other, chunks of labels in parallel.

#include <cstring>

#include "ops.h"
#include "pool.h"

namespace flashrt {
namespace {

constexpr int CHUNKS = 8;  // that a thread takes at a time
constexpr float LOG2_E = 1.44269504f;

int64_t chunks_of(int64_t context) { return (context + LABEL_CHUNK - 1) / LABEL_CHUNK; }

struct Head {  // scratch memory of one KV head
    int8_t* codes;
    float *scales, *best, *total, *sums, *weights;
    size_t step;  // chunks of all of `context`

    Head(char* memory, int group, int64_t context, int block) : step(static_cast<size_t>(chunks_of(context))) {
        const size_t queries = static_cast<size_t>(group), blocks = LABEL_CHUNK / block;
        weights = reinterpret_cast<float*>(memory);
        sums = weights + step * blocks;
        best = sums + step * queries * blocks;
        total = best + step * queries;
        scales = total + step * queries;
        codes = reinterpret_cast<int8_t*>(scales + queries);
    }
    static size_t bytes(int group, int64_t context, int block) {
        const size_t queries = static_cast<size_t>(group), blocks = LABEL_CHUNK / block;
        const size_t step = static_cast<size_t>(chunks_of(context));
        const size_t floats = step * ((queries + 1) * blocks + 2 * queries) + queries;
        return (sizeof(float) * floats + queries * WIDEST_HEAD + 63) / 64 * 64;
    }
};

struct Row {
    const SelectJob& job;
    int token, group;
    int64_t begin, end;          // tokens that are candidates
    int64_t first_chunk, chunks;

    Row(const SelectJob& job, int token) : job(job), token(token), group(job.heads / job.labels.kv_heads) {
        begin = static_cast<int64_t>(job.first) * job.block;
        end = static_cast<int64_t>(job.ends[token]) * job.block;
        first_chunk = begin / LABEL_CHUNK;
        chunks = candidates() > 0 ? chunks_of(end) - first_chunk : 0;
    }
    int candidates() const { return job.ends[token] - job.first; }
    size_t place(int head) const { return static_cast<size_t>(token) * job.labels.kv_heads + head; }
    int keep(int head) const {
        const int most = candidates() > 0 ? candidates() : 0;
        return job.keep[place(head)] < most ? job.keep[place(head)] : most;
    }
    bool scored(int head) const { return keep(head) > 0 && keep(head) < candidates(); }
    int32_t* chosen(int head) const { return job.chosen + place(head) * job.most; }
    Head memory(int head) const {
        const int64_t context = job.labels.groups * LABEL_TOKENS;
        const size_t aligned = (reinterpret_cast<size_t>(job.scratch) + 63) / 64 * 64;
        const size_t own = aligned + head * Head::bytes(group, context, job.block);
        return {reinterpret_cast<char*>(own), group, context, job.block};
    }
};

void encode_queries(const Row& row, int head) {
    const Head memory = row.memory(head);
    const int channels = row.job.labels.channels;
    for (int g = 0; g < row.group; ++g) {
        const float* q = row.job.q + row.token * row.job.q_step + static_cast<size_t>(head * row.group + g) * channels;
        const float scale = kernels().encode_query(q, row.job.step + static_cast<size_t>(head) * channels, channels,
                                                   memory.codes + static_cast<size_t>(g) * channels);
        memory.scales[g] = row.job.scale * scale * LOG2_E;
    }
}

void score(const Row& row, int head, int64_t chunk) {  // counted from the first that has candidates
    const Head memory = row.memory(head);
    const int64_t token = (row.first_chunk + chunk) * LABEL_CHUNK;
    LabelChunk c{};
    c.labels = row.job.labels.at(head, token / LABEL_TOKENS);
    c.channels = row.job.labels.channels;
    c.begin = row.begin > token ? static_cast<int>(row.begin - token) : 0;
    c.end = row.end < token + LABEL_CHUNK ? static_cast<int>(row.end - token) : LABEL_CHUNK;
    c.block = row.job.block;
    c.queries = row.group;
    c.codes = memory.codes;
    c.scales = memory.scales;
    c.best = memory.best + chunk;
    c.total = memory.total + chunk;
    c.step = memory.step;
    c.sums = memory.sums + static_cast<size_t>(chunk) * row.group * (LABEL_CHUNK / c.block);
    kernels().score_labels(c);
}

uint32_t bits_of(float weight) {  // in the order of weights, which are not negative
    uint32_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    return bits;
}

// The bits of the `keep`-th heaviest weight; `ties`: how many of the chosen weigh just as much.
uint32_t threshold(const float* weights, int count, int keep, int& ties) {
    uint32_t found = 0, known = 0;
    ties = keep;
    for (int shift : {21, 10, 0}) {
        const uint32_t digits = shift ? 2047 : 1023;
        int histogram[2048] = {};
        for (int i = 0; i < count; ++i) {
            const uint32_t bits = bits_of(weights[i]);
            if ((bits & known) == found) ++histogram[bits >> shift & digits];
        }
        uint32_t digit = digits;
        for (; histogram[digit] < ties; --digit) ties -= histogram[digit];
        found |= digit << shift;
        known |= digits << shift;
    }
    return found;
}

void choose(const Row& row, int head) {
    const Head memory = row.memory(head);
    kernels().weigh_blocks({static_cast<int>(row.chunks), row.group, row.job.block, memory.best, memory.total,
                            memory.step, memory.sums, memory.weights});
    const float* weights = memory.weights + (row.job.first - row.first_chunk * LABEL_CHUNK / row.job.block);
    int ties;
    const uint32_t least = threshold(weights, row.candidates(), row.keep(head), ties);
    int32_t* to = row.chosen(head);
    for (int i = 0; i < row.candidates(); ++i) {
        const uint32_t bits = bits_of(weights[i]);
        if (bits > least || (bits == least && ties-- > 0)) *to++ = row.job.first + i;
    }
}

void select(const Row& row) {
    const int heads = row.job.labels.kv_heads;
    const int64_t pieces = (row.chunks + CHUNKS - 1) / CHUNKS;
    for (int h = 0; h < heads; ++h) {
        row.job.counts[row.place(h)] = row.keep(h);
        if (row.scored(h)) encode_queries(row, h);
        else for (int i = 0; i < row.keep(h); ++i) row.chosen(h)[i] = row.job.first + i;
    }
    parallel_for(heads * pieces, [&](int64_t item, int) {
        const int head = static_cast<int>(item / pieces);
        const int64_t from = item % pieces * CHUNKS, to = from + CHUNKS < row.chunks ? from + CHUNKS : row.chunks;
        for (int64_t c = from; c < to && row.scored(head); ++c) score(row, head, c);
    });
    parallel_for(heads, [&](int64_t head, int) {
        if (row.scored(static_cast<int>(head))) choose(row, static_cast<int>(head));
    });
}

}  // namespace

size_t select_scratch_bytes(int heads, int kv_heads, int64_t context, int block) {
    return 64 + kv_heads * Head::bytes(heads / kv_heads, context, block);
}

void select(const SelectJob& job) {
    for (int token = 0; token < job.tokens; ++token) select(Row(job, token));
}

}  // namespace flashrt
