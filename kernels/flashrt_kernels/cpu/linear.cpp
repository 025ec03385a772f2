#include "ops.h"
#include "tokens.h"

namespace flashrt {
namespace {

constexpr size_t AHEAD = 16384;  // bytes: a few times the bandwidth of a core times the latency of memory

// The products of `rows` rows of bundles [from, to). What others do meanwhile are the `between` bytes behind them.
void products(const Rows& w, int64_t from, int64_t to, int rows, size_t between, const Tokens& tokens, float* out,
              size_t out_step) {
    const uint8_t *at[GATHER], *next[GATHER], *end = w.data + to * w.stride;
    for (; from < to; from += GATHER) {
        const int count = static_cast<int>(to - from < GATHER ? to - from : GATHER);
        for (int i = 0; i < count; ++i) {
            at[i] = w.data + (from + i) * w.stride;
            next[i] = at[i] + AHEAD + (at[i] + AHEAD < end ? 0 : between);
        }
        kernels().dots(w.codec, {at, next, count, rows}, tokens, {out + from * MATRIX_ROWS, MATRIX_ROWS, 1, out_step});
    }
}

void linear_batch(const LinearJob& job, int first, int count) {
    const Kernels& kernel = kernels();
    const Rows& w = job.weights;
    Tokens tokens = tokens_in(scratch(0, tokens_bytes(NARROW_TOKENS, w.k)), count, w.k);
    for (int i = 0; i < count; ++i) kernel.prepare(w.codec, job.x + (first + i) * job.x_step, i, tokens);

    const int64_t whole = job.rows / MATRIX_ROWS, bundles = (job.rows + MATRIX_ROWS - 1) / MATRIX_ROWS;
    const int64_t grain = 1 + 65536 / static_cast<int64_t>(MATRIX_ROWS * row_bytes(w.codec, w.k));
    const size_t between = (threads() - 1) * grain * w.stride;
    float* out = job.out + first * job.out_step + job.row0;
    parallel_for((bundles + grain - 1) / grain, [&](int64_t item, int) {
        const int64_t begin = item * grain, end = begin + grain < bundles ? begin + grain : bundles;
        const int rest = static_cast<int>(job.rows - whole * MATRIX_ROWS);
        products(w, begin, end < whole ? end : whole, MATRIX_ROWS, between, tokens, out, job.out_step);
        products(w, begin > whole ? begin : whole, end, rest, between, tokens, out, job.out_step);
        if (!job.bias) return;
        const int64_t last = end * MATRIX_ROWS < job.rows ? end * MATRIX_ROWS : job.rows;
        for (int i = 0; i < count; ++i)
            for (int64_t r = begin * MATRIX_ROWS; r < last; ++r) out[i * job.out_step + r] += job.bias[r];
    });
}

// Of any k that `linear_by_head` takes.
constexpr size_t HEAD_SPANS = (WIDEST_HEAD + SPAN_WEIGHTS - 1) / SPAN_WEIGHTS;
constexpr size_t HEAD_BYTES = 64 + NARROW_TOKENS * (4 * (WIDEST_HEAD + CHUNK) + HEAD_SPANS * (2 * SPAN_WEIGHTS + 8 * INT4_SPAN + 4 * 32));

// Rows [begin, end) of the matrix, all of one head.
void one_head(const HeadsJob& job, int64_t begin, int64_t end) {
    alignas(64) char memory[HEAD_BYTES];
    const int64_t head = begin / job.each;
    Rows w = job.weights;
    w.data += (begin - job.row0) / MATRIX_ROWS * w.stride;
    for (int first = 0; first < job.tokens; first += NARROW_TOKENS) {
        const int count = job.tokens - first < NARROW_TOKENS ? job.tokens - first : NARROW_TOKENS;
        Tokens tokens = tokens_in(memory, count, w.k);
        for (int i = 0; i < count; ++i)
            kernels().prepare(w.codec, job.x + (first + i) * job.x_step + head * job.x_head, i, tokens);
        float* out = job.out + first * job.out_step + head * job.out_head + (begin - head * job.each);
        products(w, 0, (end - begin) / MATRIX_ROWS, MATRIX_ROWS, 0, tokens, out, job.out_step);
    }
}

}  // namespace

void linear_by_head(const HeadsJob& job) {
    const int64_t first = job.row0 / job.each, last = job.row0 + job.rows;
    parallel_for((last + job.each - 1) / job.each - first, [&](int64_t item, int) {
        const int64_t begin = (first + item) * job.each, end = begin + job.each;
        one_head(job, begin > job.row0 ? begin : job.row0, end < last ? end : last);
    });
}

void linear(const LinearJob& job) {
    for (int i = 0; i < job.tokens; i += NARROW_TOKENS)
        linear_batch(job, i, job.tokens - i < NARROW_TOKENS ? job.tokens - i : NARROW_TOKENS);
}

}  // namespace flashrt
