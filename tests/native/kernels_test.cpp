// The CPU kernels without Python: on memory of exactly the size they may touch, from several threads at once.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "ops.h"
#include "pool.h"

using namespace flashrt;

namespace {

constexpr Codec CODECS[] = {Codec::F32, Codec::BF16, Codec::INT8, Codec::INT4};

std::vector<float> normal(size_t n, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> distribution;
    std::vector<float> result(n);
    for (float& x : result) x = distribution(random);
    return result;
}

// `bundles` bundles of `rows` packed rows of k random weights; no byte lies behind the last one.
struct Packed {
    Packed(Codec codec, int k, int rows, int64_t bundles) {
        const size_t bytes = row_bytes(codec, k);
        std::vector<float> weights = normal(bundles * rows * k, 7);
        for (float& w : weights) w /= std::sqrt(static_cast<float>(k));
        data.resize(bundles * rows * bytes);
        quantize(codec, weights.data(), bundles * rows, k, nullptr, data.data(), bytes);
        this->rows = {codec, k, data.data(), rows * bytes, bundles};
    }
    std::vector<uint8_t> data;
    Rows rows;
};

float distance(const std::vector<float>& a, const std::vector<float>& b) {
    double error = 0, size = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        size += b[i] * b[i];
    }
    return static_cast<float>(std::sqrt(error / size));
}

std::vector<float> linear_of(const Packed& w, const std::vector<float>& x, int tokens, bool wide) {
    const int64_t rows = w.rows.bundles * MATRIX_ROWS - 3;  // the last bundle is not full
    std::vector<float> out(tokens * rows);
    const LinearJob job{x.data(), static_cast<size_t>(w.rows.k), tokens, w.rows, out.data(),
                        static_cast<size_t>(rows), 0, rows, nullptr};
    if (wide) {
        const int crew = threads();
        std::vector<char> scratch(gemm_scratch_bytes(tokens, w.rows.k, 0, crew));
        gemm_linear(job, scratch.data(), crew);
    } else {
        linear(job);
    }
    return out;
}

std::vector<float> glu_of(const Packed& w, const std::vector<float>& x, int tokens, bool gated, bool wide) {
    std::vector<float> y(x.size(), 0.25f);
    std::vector<float> usage(w.rows.bundles);
    const Neurons neurons{w.rows.codec, w.rows.codec, w.rows.codec, 1, w.rows.k, gated, w.rows.data, w.rows.stride,
                          w.rows.bundles};
    GluJob job{x.data(), static_cast<size_t>(w.rows.k), y.data(), static_cast<size_t>(w.rows.k), tokens, nullptr,
               nullptr, neurons, {}, nullptr, w.rows.bundles, {Function::SILU, 0.0f}, nullptr, usage.data()};
    if (wide) {
        const int crew = threads();
        std::vector<char> scratch(gemm_scratch_bytes(tokens, w.rows.k, w.rows.bundles, crew));
        gemm_glu(job, scratch.data(), crew);
    } else {
        glu(job);
        std::vector<float> gathered(x.size(), 0.25f);
        const int64_t half = w.rows.bundles / 2;
        std::vector<int32_t> slots;
        for (int64_t i = 0; i < w.rows.bundles; ++i) slots.push_back(static_cast<int32_t>(i < half ? i : half - 1 - i));
        Neurons rest = neurons;
        rest.data += half * rest.stride;
        rest.bundles -= half;
        job.y = gathered.data();
        job.neurons.bundles = half;
        job.streamed = {rest};
        job.slots = slots.data();
        glu(job);
        CHECK(gathered == y);
    }
    return y;
}

struct Layer {  // rows of one codec for each operation, encoded by one instruction set: near ties they differ
    Layer(Codec codec, int k) : matrix(codec, k, MATRIX_ROWS, 5), ungated(codec, k, 2, 291), gated(codec, k, 3, 291) {}

    // One pass over all operations; what they gave, one after the other.
    std::vector<float> run(const std::vector<float>& x, int tokens, bool wide) const {
        std::vector<float> all = linear_of(matrix, x, tokens, wide);
        for (bool has_gate : {false, true}) {
            const std::vector<float> y = glu_of(has_gate ? gated : ungated, x, tokens, has_gate, wide);
            all.insert(all.end(), y.begin(), y.end());
        }
        return all;
    }
    Packed matrix, ungated, gated;
};

void check_layer(const Layer& layer, const std::vector<float>& x, int tokens) {
    force_isa("scalar");
    set_threads(1);
    const std::vector<float> expected = layer.run(x, tokens, false);
    const char* names[8];
    for (int i = available_isas(names, 8); i-- > 0;) {
        force_isa(names[i]);
        set_threads(1);
        const std::vector<float> alone = layer.run(x, tokens, false);
        CHECK(distance(alone, expected) < 1e-3f);
        set_threads(3);
        CHECK(layer.run(x, tokens, false) == alone);
        CHECK(distance(layer.run(x, tokens, true), expected) < 5e-2f);
    }
}

void check_rows() {
    for (Codec codec : CODECS)
        for (int k : {1, 63, 160, 352}) {
            force_isa(nullptr);
            const Layer layer(codec, k);
            for (int tokens : {1, 5, 17}) check_layer(layer, normal(static_cast<size_t>(tokens) * k, 3), tokens);
        }
}

// The matrices of all heads at once, cut within a head, give what each gives alone.
void check_heads() {
    constexpr int HEADS = 3, BUNDLES = 2, EACH = BUNDLES * MATRIX_ROWS, CUT = 3 * MATRIX_ROWS;
    for (Codec codec : CODECS)
        for (int k : {1, 63, WIDEST_HEAD})
            for (int tokens : {1, 16, 17}) {
                const Packed w(codec, k, MATRIX_ROWS, HEADS * BUNDLES);
                const std::vector<float> x = normal(static_cast<size_t>(tokens) * HEADS * k, 5);
                std::vector<float> out(tokens * HEADS * EACH), alone(out.size());
                const size_t x_step = HEADS * k, out_step = HEADS * EACH, own = k;
                set_threads(3);
                for (int row0 : {0, CUT}) {
                    Rows part = w.rows;
                    part.data += row0 / MATRIX_ROWS * part.stride;
                    const int64_t rows = row0 ? HEADS * EACH - CUT : CUT;
                    linear_by_head({x.data(), x_step, own, tokens, part, out.data(), out_step, EACH, row0, rows, EACH});
                }
                set_threads(1);
                for (int h = 0; h < HEADS; ++h) {
                    Rows part = w.rows;
                    part.data += h * BUNDLES * part.stride;
                    linear({x.data() + h * k, x_step, tokens, part, alone.data(), out_step, h * EACH, EACH, nullptr});
                }
                CHECK(out == alone);
            }
}

constexpr KvCodecs KV_CODECS[] = {
    {Codec::F32, Codec::F32}, {Codec::BF16, Codec::BF16}, {Codec::Q8_0, Codec::Q8_0}, {Codec::Q8_0, Codec::Q4_0},
    {Codec::F32, Codec::F32, true}, {Codec::BF16, Codec::BF16, true}, {Codec::Q8_0, Codec::Q8_0, true}};

void check_attention(KvCodecs codecs) {
    constexpr int TOKENS = 5, HEADS = 6, KV_HEADS = 2, DIM = 80, CONTEXT = 300, START = CONTEXT - TOKENS;
    const std::vector<float> q = normal(TOKENS * HEADS * DIM, 1), k = normal(CONTEXT * KV_HEADS * DIM, 2);
    std::vector<uint8_t> cache(KV_HEADS * CONTEXT * kv_pair_bytes(codecs, DIM));
    kv_append(k.data(), KV_HEADS * DIM, k.data(), KV_HEADS * DIM, CONTEXT, KV_HEADS, DIM, cache.data(), codecs, CONTEXT, 0);
    auto run = [&](const Tree* tree) {
        std::vector<float> out(TOKENS * HEADS * DIM);
        const int crew = threads();
        std::vector<char> scratch(attention_scratch_bytes(TOKENS, HEADS, KV_HEADS, DIM, crew));
        attention({q.data(), HEADS * DIM, TOKENS, HEADS, KV_HEADS, DIM, DIM, cache.data(), codecs, CONTEXT, START, 100, 0.1f,
                   30.0f, out.data(), HEADS * DIM, scratch.data(), crew, tree});
        return out;
    };
    const int32_t row[TOKENS] = {-1, 0, 1, 2, 3}, fork[TOKENS] = {-1, -1, 0, 1, 1};
    const Tree chain(row, TOKENS), tree(fork, TOKENS);
    set_threads(1);
    const std::vector<float> alone = run(nullptr), forked = run(&tree);
    set_threads(4);
    CHECK(run(nullptr) == alone);
    CHECK(run(&chain) == alone);
    CHECK(run(&tree) == forked);
    CHECK(forked != alone);
}

// Lists of all positions give what attention does, and blocks are chosen alike by any number of threads.
void check_lists(KvCodecs codecs) {
    constexpr int TOKENS = 2, HEADS = 6, KV_HEADS = 2, DIM = 20, CONTEXT = 304, CHANNELS = 24, BLOCK = 8, KEEP = 5;
    const std::vector<float> q = normal(TOKENS * HEADS * DIM, 1), k = normal(CONTEXT * KV_HEADS * DIM, 2);
    std::vector<uint8_t> near(KV_HEADS * CONTEXT * kv_pair_bytes(codecs, DIM));
    const size_t kv_step = KV_HEADS * DIM;
    kv_append(k.data(), kv_step, k.data(), kv_step, CONTEXT, KV_HEADS, DIM, near.data(), codecs, CONTEXT, 0);
    std::vector<int32_t> lists(TOKENS * KV_HEADS * CONTEXT), counts;
    for (size_t i = 0; i < lists.size(); ++i) lists[i] = static_cast<int32_t>(i % CONTEXT);
    for (int i = 0; i < TOKENS * KV_HEADS; ++i) counts.push_back(CONTEXT - TOKENS + 1 + i / KV_HEADS);
    std::vector<float> dense(TOKENS * HEADS * DIM), out(dense.size());
    const std::vector<float> values = normal(CONTEXT * KV_HEADS * CHANNELS, 3), low(KV_HEADS * CHANNELS, -2.0f);
    const std::vector<float> step(KV_HEADS * CHANNELS, 0.3f), labels_q = normal(TOKENS * HEADS * CHANNELS, 4);
    std::vector<uint8_t> codes(KV_HEADS * CONTEXT * CHANNELS / 2);
    const Labels labels{codes.data(), KV_HEADS, CHANNELS, CONTEXT / LABEL_TOKENS};
    label_append({values.data(), KV_HEADS * CHANNELS, CONTEXT, low.data(), step.data(), labels, 0});
    const int32_t ends[TOKENS] = {33, CONTEXT / BLOCK}, keep[TOKENS * KV_HEADS] = {KEEP, 0, 1, KEEP};
    std::vector<int32_t> first;
    for (int crew : {1, 4}) {
        set_threads(crew);
        std::vector<char> scratch(attention_scratch_bytes(TOKENS, HEADS, KV_HEADS, DIM, crew));
        attention({q.data(), HEADS * DIM, TOKENS, HEADS, KV_HEADS, DIM, DIM, near.data(), codecs, CONTEXT, CONTEXT - TOKENS, 0,
                   0.1f, 0.0f, dense.data(), HEADS * DIM, scratch.data(), crew, nullptr});
        scratch.assign(attention_list_scratch_bytes(TOKENS, HEADS, KV_HEADS, DIM, crew), 0);
        attention_list({q.data(), HEADS * DIM, TOKENS, HEADS, KV_HEADS, DIM, DIM, near.data(), nullptr, codecs, CONTEXT,
                        lists.data(), counts.data(), CONTEXT, 0.1f, 0.0f, out.data(), HEADS * DIM, scratch.data(),
                        crew});
        CHECK(out == dense);
        scratch.assign(select_scratch_bytes(HEADS, KV_HEADS, CONTEXT, BLOCK), 0);
        std::vector<int32_t> chosen(TOKENS * KV_HEADS * KEEP, -1), found(TOKENS * KV_HEADS);
        select({labels_q.data(), HEADS * CHANNELS, TOKENS, HEADS, labels, step.data(), 0.2f, 1, ends, keep, BLOCK,
                chosen.data(), found.data(), KEEP, scratch.data()});
        for (int i = 0; i < TOKENS * KV_HEADS; ++i) CHECK(found[i] == keep[i]);
        if (crew == 1) first = chosen;
        CHECK(chosen == first);
    }
}

void check_elementwise() {
    constexpr int N = 3, K = 77;
    const std::vector<float> x = normal(N * K, 4), weight = normal(K, 5), bias = normal(K, 6);
    std::vector<float> out(N * K);
    rms_norm(x.data(), K, N, K, weight.data(), 1e-5f, out.data(), K);
    layer_norm(x.data(), K, N, K, weight.data(), bias.data(), 1e-5f, out.data(), K);
    std::vector<float> heads = normal(N * 2 * 10, 8), angles = normal(N * 5, 9);
    rope(heads.data(), 20, 10, N, 2, 10, angles.data(), angles.data());
    for (Codec codec : CODECS) {
        const Packed rows(codec, K, 1, N);
        std::vector<float> back(N * K);
        dequantize(codec, rows.data.data(), rows.rows.stride, N, K, back.data(), K);
        for (float value : back) CHECK(std::isfinite(value));
    }
    const std::vector<uint8_t> memory(4096 * 3);
    read_all(memory.data(), memory.size());
}

// Callers take turns at the pool; its size changes meanwhile.
void check_callers() {
    set_threads(2);
    const Packed w(Codec::INT4, 352, 3, 291);
    const std::vector<float> x = normal(20 * 352, 3), expected = glu_of(w, x, 1, true, false);
    const std::vector<float> wide = glu_of(w, x, 20, true, true);
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i)
        callers.emplace_back([&] {
            for (int round = 0; round < 20; ++round) {
                CHECK(glu_of(w, x, 1, true, false) == expected);
                CHECK(glu_of(w, x, 20, true, true) == wide);
            }
        });
    for (int n : {1, 4, 2, 3}) set_threads(n);
    for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main() {
    check_rows();
    check_heads();
    const char* names[8];
    for (int i = available_isas(names, 8); i-- > 0;) {
        force_isa(names[i]);
        for (const KvCodecs& codecs : KV_CODECS) {
            check_attention(codecs);
            check_lists(codecs);
        }
        check_elementwise();
    }
    force_isa(nullptr);
    check_callers();
    set_threads(1);  // joins the workers
    std::puts("kernels: fine");
    return 0;
}
