// Python entry points: arguments are checked and become pointers, and the GIL is released.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "ops.h"
#include "pool.h"

namespace flashrt {
namespace {

using nb::handle;
using Released = nb::gil_scoped_release;
using Named = std::tuple<int, float, float>;  // an activation as Python has it: function, threshold, limit

Activation activation_of(Named named) {
    return {static_cast<Function>(std::get<0>(named)), std::get<1>(named), std::get<2>(named)};
}

bool overlap(const Array<const float>& a, const Array<float>& b) {
    if (a.size() == 0 || b.size() == 0) return false;
    const float* a_end = a.data + a.step[0] * (a.shape[0] - 1) + a.shape[1];
    const float* b_end = b.data + b.step[0] * (b.shape[0] - 1) + b.shape[1];
    return a.data < b_end && b.data < a_end;
}

LinearJob linear_job(handle x_, handle bundles, int codec, handle out_, int64_t row0, int64_t rows, handle bias) {
    const Array<const float> x("x", x_, 2);
    const Rows w = bundles_of(bundles, codec, MATRIX_ROWS, x.shape[1]);
    const Array<float> out("out", out_, 2);
    out.expect(0, x.shape[0]);
    if (rows < 0 || rows > MATRIX_ROWS * w.bundles)
        wrong("rows", std::to_string(w.bundles) + " bundles hold " + std::to_string(MATRIX_ROWS * w.bundles) +
                          " rows, asked for " + std::to_string(rows));
    if (row0 < 0 || rows > out.shape[1] - row0)
        wrong("out", std::to_string(out.shape[1]) + " columns cannot take rows " + std::to_string(row0) + " to " +
                         std::to_string(row0 + rows));
    return {x.data, static_cast<size_t>(x.step[0]), static_cast<int>(x.shape[0]), w, out.data,
            static_cast<size_t>(out.step[0]), row0, rows, vector_or_null<float>("bias", bias, rows)};
}

HeadsJob heads_job(handle x_, handle bundles, int codec, handle out_, int64_t row0, int64_t rows) {
    const Array<const float> x("x", x_, 3);
    if (x.shape[2] > WIDEST_HEAD)
        wrong("x", "heads of 1 to " + std::to_string(WIDEST_HEAD) + " are supported, found " + std::to_string(x.shape[2]));
    const Rows w = bundles_of(bundles, codec, MATRIX_ROWS, x.shape[2]);
    const Array<float> out("out", out_, 3);
    for (int i = 0; i < 2; ++i) out.expect(i, x.shape[i]);
    const int64_t each = out.shape[2];
    if (each < 1 || each % MATRIX_ROWS)
        wrong("out", "expected whole bundles of rows for each head, found " + std::to_string(each));
    if (row0 < 0 || row0 % MATRIX_ROWS || row0 > each * x.shape[1])
        wrong("row0", "expected the first row of a bundle, found " + std::to_string(row0));
    if (rows < 0 || rows % MATRIX_ROWS || rows > MATRIX_ROWS * w.bundles || rows > each * x.shape[1] - row0)
        wrong("rows", "expected whole bundles, of " + std::to_string(w.bundles) + " and up to row " +
                          std::to_string(each * x.shape[1]) + ", found " + std::to_string(rows));
    return {x.data, static_cast<size_t>(x.step[0]), static_cast<size_t>(x.step[1]), static_cast<int>(x.shape[0]), w,
            out.data, static_cast<size_t>(out.step[0]), static_cast<size_t>(out.step[1]), row0, rows, each};
}

// Places of bundles, in any order; -1 - i is number i of those streamed.
const int32_t* slots_of(handle object, int64_t bundles, int64_t streamed, int64_t& count) {
    if (object.is_none()) return nullptr;
    const Array<const int32_t> slots("slots", object, 1);
    count = slots.shape[0];
    for (int64_t i = 0; i < count; ++i)
        if (slots.data[i] < -streamed || slots.data[i] >= bundles)
            wrong("slots", "expected numbers of " + std::to_string(-streamed) + " to below " + std::to_string(bundles) +
                               ", found " + std::to_string(slots.data[i]));
    return slots.data;
}

using Codecs = std::tuple<int, int, int, int>;  // of gate, up and down, and neurons of a bundle

void check_codecs(const Neurons& w) {
    if (w.gated && is_kept(w.gate) != is_kept(w.up)) wrong("codec", "gate and up must both be kept, or neither");
    check_blocks(w.up, w.k, "x");
    if (w.gated) check_blocks(w.gate, w.k, "x");
    if (w.group == 1 && is_kept(w.down)) wrong("codec", "down of a kept codec needs a group of neurons");
    if (w.group == 1) return;
    if (w.group < CHUNK || w.group % CHUNK || w.group > LARGEST_GROUP)
        wrong("codec", "expected groups of " + std::to_string(CHUNK) + " to " + std::to_string(LARGEST_GROUP) +
                           " neurons, in steps of " + std::to_string(CHUNK) + ", found " + std::to_string(w.group));
    if (!is_kept(w.up) || !is_kept(w.down)) wrong("codec", "rows of a group must be of kept codecs");
    check_blocks(w.down, w.group, "codec");
}

Neurons neurons_of(handle object, Codecs codecs, bool gated, int64_t k, const char* name) {
    if (k < 1 || k > LONGEST_ROW)
        wrong("x", "rows of 1 to " + std::to_string(LONGEST_ROW) + " are supported, found " + std::to_string(k));
    const Array<const uint8_t> b(name, object, 2);
    const auto [gate, up, down, group] = codecs;
    const Neurons w{static_cast<Codec>(gate), static_cast<Codec>(up), static_cast<Codec>(down), group,
                    static_cast<int>(k), gated, b.data, static_cast<size_t>(b.step[0]), b.shape[0]};
    check_codecs(w);
    const int64_t need = static_cast<int64_t>(w.bytes());
    if (b.shape[1] < need)
        wrong(name, std::to_string(group * (gated ? 3 : 2)) + " rows of " + std::to_string(k) + " weights take " +
                        std::to_string(need) + " bytes, found " + std::to_string(b.shape[1]));
    return w;
}

// Arrays of bundles that are numbered one after the other.
std::vector<Neurons> streamed_of(handle object, Codecs codecs, bool gated, int64_t k) {
    std::vector<Neurons> result;
    if (object.is_none()) return result;
    for (handle each : nb::borrow<nb::sequence>(object)) {
        if (!result.empty() && result.back().bundles != result[0].bundles)
            wrong("streamed_bundles", "all arrays but the last must have as many bundles as the first");
        result.push_back(neurons_of(each, codecs, gated, k, "streamed_bundles"));
    }
    if (result.size() > 1 && result.back().bundles > result[0].bundles)
        wrong("streamed_bundles", "the last array has more bundles than the first");
    return result;
}

int64_t bundles_in(const std::vector<Neurons>& arrays) {
    int64_t count = 0;
    for (const Neurons& each : arrays) count += each.bundles;
    return count;
}

// Each of the chosen tokens once, and none that x has not.
const int32_t* chosen_of(handle object, int64_t tokens, int64_t& count) {
    if (object.is_none()) return nullptr;
    const Array<const int32_t> chosen("tokens", object, 1);
    count = chosen.shape[0];
    std::vector<bool> seen(tokens);
    for (int64_t i = 0; i < count; ++i) {
        const int32_t token = chosen.data[i];
        if (token < 0 || token >= tokens)
            wrong("tokens", "expected rows below " + std::to_string(tokens) + ", found " + std::to_string(token));
        if (seen[token]) wrong("tokens", "token " + std::to_string(token) + " is named twice");
        seen[token] = true;
    }
    return chosen.data;
}

GluJob glu_job(handle x_, handle bundles, Codecs codecs, Named activation, bool gated, handle y_, handle up_bias,
               handle gate_bias, handle tokens, handle factors, handle slots, handle streamed_, handle usage_) {
    const Array<const float> x("x", x_, 2);
    const Neurons w = neurons_of(bundles, codecs, gated, x.shape[1], "bundles");
    std::vector<Neurons> streamed = streamed_of(streamed_, codecs, gated, x.shape[1]);
    const Array<float> y("y", y_, 2);
    for (int i = 0; i < 2; ++i) y.expect(i, x.shape[i]);
    if (overlap(x, y)) wrong("y", "shares memory with x");
    if (!gated && !gate_bias.is_none()) wrong("gate_bias", "only gated neurons have one");
    int64_t count = x.shape[0], taken = w.bundles;
    const int32_t* places = slots_of(slots, w.bundles, bundles_in(streamed), taken);
    const int32_t* chosen = chosen_of(tokens, x.shape[0], count);
    float* usage = nullptr;
    if (!usage_.is_none()) {
        const Array<float> found("usage", usage_, 1);
        found.expect(0, taken);
        usage = found.data;
    }
    return {x.data, static_cast<size_t>(x.step[0]), y.data, static_cast<size_t>(y.step[0]), static_cast<int>(count),
            chosen, vector_or_null<float>("factors", factors, count), w, std::move(streamed), places, taken,
            activation_of(activation), vector_or_null<float>("up_bias", up_bias, taken * w.group), usage,
            vector_or_null<float>("gate_bias", gate_bias, taken * w.group)};
}

AddJob add_job(handle x_, handle rows, int codec, int64_t group, handle y_, int64_t row0, handle tokens) {
    const Array<const float> x("x", x_, 2);
    const Rows w = bundles_of(rows, codec, 1, x.shape[1]);
    if (!is_kept(w.codec)) wrong("codec", "expected a kept codec");
    if (group < CHUNK || group % CHUNK || group > LARGEST_GROUP || w.k % group)
        wrong("group", "expected a divisor of " + std::to_string(w.k) + " in steps of " + std::to_string(CHUNK) +
                           ", found " + std::to_string(group));
    check_blocks(w.codec, static_cast<int>(group), "group");
    const Array<float> y("y", y_, 2);
    if (overlap(x, y)) wrong("y", "shares memory with x");
    if (row0 < 0 || w.bundles > y.shape[1] - row0)
        wrong("y", std::to_string(y.shape[1]) + " columns cannot take rows " + std::to_string(row0) + " to " +
                       std::to_string(row0 + w.bundles));
    int64_t count = y.shape[0];
    const int32_t* chosen = chosen_of(tokens, y.shape[0], count);
    x.expect(0, count);
    return {x.data, static_cast<size_t>(x.step[0]), static_cast<int>(count), chosen, w, static_cast<int>(group), y.data,
            static_cast<size_t>(y.step[0]), row0};
}

ChannelGroups channel_groups(handle object, int64_t first, int64_t fine, int64_t columns, int64_t places) {
    const Array<const uint8_t> groups("groups", object, 2);
    if (columns < TILE_COLUMNS || columns % TILE_COLUMNS)
        wrong("sums", "expected a multiple of " + std::to_string(TILE_COLUMNS) + " columns, found " +
                          std::to_string(columns));
    if (fine < 0 || fine > CHANNELS)
        wrong("fine", "expected 0 to " + std::to_string(CHANNELS) + " channels, found " + std::to_string(fine));
    const int64_t need = 2 * columns + (CHANNELS + fine) * columns / 4;
    if (groups.shape[1] < need)
        wrong("groups", std::to_string(columns) + " columns take " + std::to_string(need) + " bytes, found " +
                            std::to_string(groups.shape[1]));
    if (first < 0 || first > places / CHANNELS - groups.shape[0])
        wrong("first", std::to_string(groups.shape[0]) + " groups from " + std::to_string(first) + " are not among " +
                           std::to_string(places / CHANNELS));
    return {groups.data, static_cast<size_t>(groups.step[0]), first, groups.shape[0], static_cast<int>(fine), columns};
}

GateUpJob gate_up_job(handle x_, handle groups, int64_t first, int64_t fine, handle order_, handle norms, handle ratio,
                      handle sums_, float coarse_from, float fine_from) {
    const Array<const float> x("x", x_, 2);
    const Array<float> sums("sums", sums_, 2);
    sums.expect(0, x.shape[0]);
    const Array<const int32_t> order("order", order_, 1);
    for (int64_t i = 0; i < order.shape[0]; ++i)
        if (order.data[i] < -1 || order.data[i] >= x.shape[1])
            wrong("order", "expected channels below " + std::to_string(x.shape[1]) + ", found " +
                               std::to_string(order.data[i]));
    return {x.data, static_cast<size_t>(x.step[0]), static_cast<int>(x.shape[0]),
            channel_groups(groups, first, fine, sums.shape[1], order.shape[0]), order.data,
            vector_or_null<float>("norms", norms, x.shape[1]), coarse_from, fine_from,
            vector_or_null<float>("ratio", ratio, sums.shape[1]), sums.data, static_cast<size_t>(sums.step[0])};
}

DownJob down_job(handle sums_, handle scale_, handle norms_, Named activation, bool gated, handle up_bias, handle rows,
                 int codec, int64_t first, handle y_, float from) {
    const Array<const float> sums("sums", sums_, 2);
    const Array<float> y("y", y_, 2);
    y.expect(0, sums.shape[0]);
    const Array<const float> norms("norms", norms_, 1);
    if (gated && !up_bias.is_none()) wrong("up_bias", "only ungated neurons have one");
    if (is_kept(static_cast<Codec>(codec))) wrong("codec", "down of a kept codec needs a group of neurons");
    const Rows w = bundles_of(rows, codec, 1, y.shape[1], "rows");
    if (first < 0 || first % DOWN_STEP || first > norms.shape[0] - w.bundles)
        wrong("first", std::to_string(w.bundles) + " rows from " + std::to_string(first) + " are not among " +
                           std::to_string(norms.shape[0]) + ", or do not begin at a multiple of " +
                           std::to_string(DOWN_STEP));
    const int64_t padded = (norms.shape[0] + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
    sums.expect(1, gated ? 2 * padded : padded);
    return {sums.data, static_cast<size_t>(sums.step[0]), static_cast<int>(sums.shape[0]), gated, padded,
            vector_or_null<float>("scale", scale_, sums.shape[1]),
            vector_or_null<float>("up_bias", up_bias, norms.shape[0]), activation_of(activation), norms.data,
            from, w, first, y.data, static_cast<size_t>(y.step[0])};
}

void check_positions(int64_t start, int64_t tokens, int64_t context) {
    if (start < 0 || start > context - tokens)
        wrong("start", std::to_string(tokens) + " positions from " + std::to_string(start) +
                           " are outside a context of " + std::to_string(context));
}

std::optional<Tree> tree_or_none(handle parents_, int64_t tokens) {
    if (parents_.is_none()) return std::nullopt;
    const Array<const int32_t> parents("parents", parents_, 1);
    parents.expect(0, tokens);
    if (tokens > NARROW_TOKENS)
        wrong("parents", "a tree has at most " + std::to_string(NARROW_TOKENS) + " tokens, found " +
                             std::to_string(tokens));
    for (int64_t i = 0; i < tokens; ++i)
        if (parents.data[i] < -1 || parents.data[i] >= i)
            wrong("parents", "expected -1 or a token before token " + std::to_string(i) + ", found " +
                                 std::to_string(parents.data[i]));
    return Tree(parents.data, static_cast<int>(tokens));
}

// A job for q [tokens, heads, dim] over kv; what the job is for sets the rest.
AttentionJob attention_job(const Queries& q, const Cache& kv, float scale, float softcap, handle sinks) {
    AttentionJob job{};
    job.q = q.data;
    job.q_step = q.step;
    job.tokens = q.tokens;
    job.heads = q.heads;
    job.kv_heads = shared(kv.name, q.heads, kv.shape[0]);
    job.dim = job.values = q.dim;
    job.kv = kv.data;
    job.codecs = kv.codecs;
    job.context = kv.shape[1];
    job.scale = scale;
    job.softcap = softcap;
    job.sinks = vector_or_null<float>("sinks", sinks, q.heads);
    return job;
}

void set_state(AttentionJob& job, handle state_) {
    const Array<float> state("state", state_, 3);
    state.contiguous(2);
    state.expect(0, job.tokens);
    state.expect(1, job.heads);
    state.expect(2, attention_state_width(job.values));
    job.state = state.data;
    job.state_step = state.step[0];
}

void run(AttentionJob& job, handle scratch) {
    if (job.tokens == 0 || job.heads == 0) return;
    job.crew = threads();
    const Scratch memory(scratch, attention_scratch_bytes(job.tokens, job.heads, job.kv_heads, job.dim, job.crew));
    job.scratch = memory.data();
    Released release;
    attention(job);
}

void py_attention(handle q_, handle kv_, int64_t start, int64_t window, float scale, float softcap, handle out_,
                  handle scratch, handle parents, handle state, handle sinks, bool wide) {
    const Queries q(q_);
    const Cache kv("kv", kv_, q.dim);
    AttentionJob job = attention_job(q, kv, scale, softcap, sinks);
    if (!state.is_none() && !sinks.is_none()) wrong("sinks", "a state has them already");
    check_positions(start, job.tokens, kv.shape[1]);
    const std::optional<Tree> tree = tree_or_none(parents, job.tokens);
    const Array<float> out("out", out_, 2);
    out.expect(0, job.tokens);
    job.values = values_of("out", out.shape[1], job.heads, job.dim);
    if (!state.is_none()) set_state(job, state);
    job.start = static_cast<int>(start);
    job.window = window > kv.shape[1] ? 0 : static_cast<int>(window);  // 0: all that there is
    job.out = out.data;
    job.out_step = out.step[0];
    job.tree = tree ? &*tree : nullptr;
    job.wide = wide && !tree;
    run(job, scratch);
}

void py_attend_page(handle q_, handle page_, float scale, float softcap, handle state, bool first, handle scratch,
                    handle sinks, bool wide) {
    const Queries q(q_);
    const Cache page("page", page_, q.dim);
    AttentionJob job = attention_job(q, page, scale, softcap, sinks);
    if (page.shape[1] == 0) wrong("page", "expected one position at least");
    const int64_t width = Array<float>("state", state, 3).shape[2] - attention_state_width(0);  // whole sixteens
    if (width >= 16 && width < job.values) job.values = static_cast<int>(width);
    set_state(job, state);
    job.start = static_cast<int>(page.shape[1]) - 1;
    job.page = true;
    job.empty = first;
    job.wide = wide;
    run(job, scratch);
}

void py_kv_append(handle k_, handle v_, handle kv_, int64_t start) {
    const Array<const float> k("k", k_, 3);
    k.contiguous(2);
    const Cache kv("kv", kv_, k.shape[2]);
    if (kv.codecs.keys_only != v_.is_none()) wrong("v", kv.codecs.keys_only ? "the cache holds keys alone" : "expected values");
    const Array<const float> v("v", kv.codecs.keys_only ? k_ : v_, 3);
    v.contiguous(2);
    for (int i = 0; i < 3; ++i) v.expect(i, k.shape[i]);
    if (kv.shape[0] != k.shape[1])
        wrong("kv", "expected " + std::to_string(k.shape[1]) + " heads, found " + std::to_string(kv.shape[0]));
    check_positions(start, k.shape[0], kv.shape[1]);
    if (k.size() == 0) return;
    Released release;
    kv_append(k.data, k.step[0], v.data, v.step[0], static_cast<int>(k.shape[0]), static_cast<int>(k.shape[1]),
              static_cast<int>(k.shape[2]), kv.data, kv.codecs, kv.shape[1], start);
}

void py_norm(bool rms, handle x_, handle weight_, handle bias_, float eps, handle out_) {
    const Array<const float> x("x", x_, 2);
    const Array<const float> weight("weight", weight_, 1);
    weight.expect(0, x.shape[1]);
    const float* bias = vector_or_null<float>("bias", bias_, x.shape[1]);
    const Array<float> out("out", out_, 2);
    for (int i = 0; i < 2; ++i) out.expect(i, x.shape[i]);
    if (x.size() == 0) return;
    const int k = static_cast<int>(x.shape[1]);
    Released release;
    if (rms) rms_norm(x.data, x.step[0], x.shape[0], k, weight.data, eps, out.data, out.step[0]);
    else layer_norm(x.data, x.step[0], x.shape[0], k, weight.data, bias, eps, out.data, out.step[0]);
}

void py_activate(handle gate_, handle up_, Named activation) {
    const Array<float> gate("gate", gate_, 2);
    const float* up = nullptr;
    size_t up_step = 0;
    if (!up_.is_none()) {
        const Array<const float> found("up", up_, 2);
        for (int i = 0; i < 2; ++i) found.expect(i, gate.shape[i]);
        up = found.data;
        up_step = static_cast<size_t>(found.step[0]);
    }
    if (gate.size() == 0) return;
    Released release;
    activate(activation_of(activation), gate.data, gate.step[0], up, up_step, gate.shape[0],
             static_cast<int>(gate.shape[1]));
}

void py_rope(handle x_, handle cos_, handle sin_) {
    const Array<float> x("x", x_, 3);
    if (x.shape[2] % 2) wrong("x", "expected an even head dimension, found " + std::to_string(x.shape[2]));
    const Array<const float> cos("cos", cos_, 2), sin("sin", sin_, 2);
    for (const auto* a : {&cos, &sin}) {
        a->expect(0, x.shape[0]);
        a->expect(1, x.shape[2] / 2);
        a->contiguous(2);
    }
    if (x.size() == 0) return;
    Released release;
    rope(x.data, x.step[0], x.step[1], static_cast<int>(x.shape[0]), static_cast<int>(x.shape[1]),
         static_cast<int>(x.shape[2]), cos.data, sin.data);
}

void py_quantize(handle w_, int codec_, handle importance_, handle out_) {
    const Codec codec = static_cast<Codec>(codec_);
    if (is_kept(codec)) wrong("codec", "weights are not quantized to a kept codec");
    const Array<const float> w("weights", w_, 2);
    w.contiguous(2);
    const Array<uint8_t> out("out", out_, 2);
    const int64_t k = w.shape[1];
    if (k < 1 || k > LONGEST_ROW)
        wrong("weights", "rows of 1 to " + std::to_string(LONGEST_ROW) + " are supported, found " + std::to_string(k));
    out.expect(0, w.shape[0]);
    out.expect(1, static_cast<int64_t>(row_bytes(codec, static_cast<int>(k))));
    const float* importance = vector_or_null<float>("importance", importance_, k);
    if (w.shape[0] == 0) return;
    Released release;
    quantize(codec, w.data, w.shape[0], static_cast<int>(k), importance, out.data, out.step[0]);
}

void py_dequantize(handle rows_, int codec, int64_t k, handle out_) {
    const Rows rows = bundles_of(rows_, codec, 1, k);
    const Array<float> out("out", out_, 2);
    out.expect(0, rows.bundles);
    out.expect(1, k);
    if (rows.bundles == 0) return;
    Released release;
    dequantize(rows.codec, rows.data, rows.stride, rows.bundles, rows.k, out.data, out.step[0]);
}

}  // namespace

void bind_delta(nb::module_&);
void bind_sparse(nb::module_&);
void bind_stored(nb::module_&);

}  // namespace flashrt

using namespace flashrt;

NB_MODULE(_cpu, m) {
    m.def("set_threads", &set_threads, nb::call_guard<nb::gil_scoped_release>());
    m.def("threads", &threads);
    m.def("isa", [] { return std::string(isa()); });
    m.def("force_isa", [](const std::optional<std::string>& name) { return force_isa(name ? name->c_str() : nullptr); },
          nb::arg("name").none());
    m.def("available_isas", [] {
        const char* names[8];
        nb::list result;
        const int count = available_isas(names, 8);
        for (int i = 0; i < count; ++i) result.append(nb::str(names[i]));
        return result;
    });
    m.def("reserve", [](int64_t k) {
        if (k < 1 || k > LONGEST_ROW) wrong("k", "expected 1 to " + std::to_string(LONGEST_ROW));
        return reserve(static_cast<int>(k));
    });
    m.def("reserve_groups", &reserve_groups);

    m.def("linear", [](handle x, handle bundles, int codec, handle out, int64_t row0, int64_t rows, handle bias) {
        const LinearJob job = linear_job(x, bundles, codec, out, row0, rows, bias);
        Released release;
        if (job.tokens && rows) linear(job);
    }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
    m.def("linear_by_head", [](handle x, handle bundles, int codec, handle out, int64_t row0, int64_t rows) {
        const HeadsJob job = heads_job(x, bundles, codec, out, row0, rows);
        Released release;
        if (job.tokens && rows) linear_by_head(job);
    });
    m.def("gemm_linear", [](handle x, handle bundles, int codec, handle out, int64_t row0, int64_t rows, handle bias,
                            handle scratch) {
        const LinearJob job = linear_job(x, bundles, codec, out, row0, rows, bias);
        if (job.tokens == 0 || rows == 0) return;
        const int crew = threads();
        const Scratch memory(scratch, gemm_scratch_bytes(job.tokens, job.weights.k, 0, crew));
        Released release;
        gemm_linear(job, memory.data(), crew);
    }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none());
    m.def("linear_add", [](handle x, handle rows, int codec, int64_t group, handle y, int64_t row0, handle tokens) {
        const AddJob job = add_job(x, rows, codec, group, y, row0, tokens);
        Released release;
        if (job.tokens && job.weights.bundles) linear_add(job);
    }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
    m.def("gemm_linear_add", [](handle x, handle rows, int codec, int64_t group, handle y, int64_t row0, handle tokens,
                                handle scratch) {
        const AddJob job = add_job(x, rows, codec, group, y, row0, tokens);
        if (job.tokens == 0 || job.weights.bundles == 0) return;
        const int crew = threads();
        const Scratch memory(scratch, gemm_scratch_bytes(job.tokens, job.weights.k, 0, crew));
        Released release;
        gemm_linear_add(job, memory.data(), crew);
    }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none());
    m.def("glu", [](handle x, handle bundles, Codecs codec, Named activation, bool gated, handle y, handle up_bias,
                    handle gate_bias, handle tokens, handle factors, handle slots, handle streamed, handle usage) {
        const GluJob job = glu_job(x, bundles, codec, activation, gated, y, up_bias, gate_bias, tokens, factors, slots,
                                   streamed, usage);
        Released release;
        if (job.tokens && job.count) glu(job);
    }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(),
       nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none());
    m.def("gemm_glu", [](handle x, handle bundles, Codecs codec, Named activation, bool gated, handle y, handle up_bias,
                         handle gate_bias, handle tokens, handle factors, handle scratch, handle usage) {
        const GluJob job = glu_job(x, bundles, codec, activation, gated, y, up_bias, gate_bias, tokens, factors,
                                   nb::none(), nb::none(), usage);
        if (job.tokens == 0 || job.neurons.bundles == 0) return;
        const int crew = threads();
        const Scratch memory(scratch, gemm_scratch_bytes(job.tokens, job.neurons.k, job.neurons.bundles * job.neurons.group,
                                                        crew));
        Released release;
        gemm_glu(job, memory.data(), crew);
    }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(),
       nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none());
    m.def("gate_up", [](handle x, handle groups, int64_t first, int64_t fine, handle order, handle norms, handle ratio,
                        handle sums, float coarse_from, float fine_from) {
        const GateUpJob job = gate_up_job(x, groups, first, fine, order, norms, ratio, sums, coarse_from, fine_from);
        ChannelCount count;
        {
            Released release;
            if (job.tokens && job.groups.count) count = gate_up(job);
        }
        return nb::make_tuple(count.coarse, count.fine);
    });
    m.def("down", [](handle sums, handle scale, handle norms, Named activation, bool gated, handle up_bias, handle rows,
                     int codec, int64_t first, handle y, float from) {
        const DownJob job = down_job(sums, scale, norms, activation, gated, up_bias, rows, codec, first, y, from);
        Released release;
        return job.rows.bundles ? down(job) : 0;
    }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
       nb::arg(), nb::arg());
    m.def("gemm_gate_up", [](handle x, handle groups, int64_t first, int64_t fine, handle order, handle ratio,
                             handle sums, handle scratch) {
        const GateUpJob job = gate_up_job(x, groups, first, fine, order, nb::none(), ratio, sums, 0, 0);
        if (job.tokens == 0 || job.groups.count == 0) return;
        const int crew = threads();
        const Scratch memory(scratch, gate_up_scratch_bytes(job.tokens, static_cast<int>(job.groups.count), crew));
        Released release;
        gemm_gate_up(job, memory.data(), crew);
    }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
    m.def("gemm_down", [](handle sums, handle scale, handle norms, Named activation, bool gated, handle up_bias,
                          handle rows, int codec, int64_t first, handle y, handle scratch) {
        const DownJob job = down_job(sums, scale, norms, activation, gated, up_bias, rows, codec, first, y, 0);
        if (job.tokens == 0 || job.rows.bundles == 0) return;
        const int crew = threads();
        const Scratch memory(scratch, gemm_scratch_bytes(job.tokens, job.rows.k, job.rows.bundles, crew));
        Released release;
        gemm_down(job, memory.data(), crew);
    }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
       nb::arg(), nb::arg().none());
    m.def("gate_up_scratch_bytes", [](int tokens, int groups) {
        return gate_up_scratch_bytes(tokens, groups, threads());
    });
    m.def("gemm_scratch_bytes", [](int tokens, int k, int64_t neurons) {
        return gemm_scratch_bytes(tokens, k, neurons, threads());
    });

    m.def("attention_scratch_bytes", [](int tokens, int heads, int kv_heads, int dim) {
        return attention_scratch_bytes(tokens, heads, kv_heads, dim, threads());
    });
    m.def("attention", &py_attention, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg());
    m.def("attend_page", &py_attend_page, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg().none(), nb::arg().none(), nb::arg());
    m.def("attention_state_width", &attention_state_width);
    m.def("kv_append", &py_kv_append, nb::arg(), nb::arg().none(), nb::arg(), nb::arg());
    bind_delta(m);
    bind_sparse(m);
    bind_stored(m);
    m.def("rms_norm", [](handle x, handle weight, float eps, handle out) {
        py_norm(true, x, weight, nb::none(), eps, out);
    });
    m.def("layer_norm", [](handle x, handle weight, handle bias, float eps, handle out) {
        py_norm(false, x, weight, bias, eps, out);
    }, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg());
    m.def("activate", &py_activate, nb::arg(), nb::arg().none(), nb::arg());
    m.def("rope", &py_rope);

    m.def("quantize", &py_quantize, nb::arg(), nb::arg(), nb::arg().none(), nb::arg());
    m.def("dequantize", &py_dequantize);
    m.def("read_all", [](handle data_) {
        const Array<const uint8_t> data("data", data_, 1);
        Released release;
        return read_all(data.data, data.size());
    });
}
