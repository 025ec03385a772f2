// Python entry points of gated delta nets and of gates; see bindings.cpp.

#include <string>

#include "arguments.h"
#include "ops.h"
#include "pool.h"

namespace flashrt {
namespace {

using nb::handle;
using Released = nb::gil_scoped_release;

// Rows behind those that advance the state: few, as each has a state of its own.
const int32_t* parents_of(handle object, int64_t behind) {
    if (behind > NARROW_TOKENS)
        wrong("advance", "at most " + std::to_string(NARROW_TOKENS) + " rows may lie behind it, found " +
                             std::to_string(behind));
    if (object.is_none()) return nullptr;
    const Array<const int32_t> parents("parents", object, 1);
    parents.expect(0, behind);
    for (int64_t i = 0; i < behind; ++i)
        if (parents.data[i] < -1 || parents.data[i] >= i)
            wrong("parents", "expected -1 or a row before row " + std::to_string(i) + ", found " +
                                 std::to_string(parents.data[i]));
    return parents.data;
}

// How many there are. Refuses shapes that do not go together.
int key_heads(const DeltaJob& job, int64_t taps) {
    if (taps < 2 || taps > MOST_TAPS)
        wrong("taps", "expected 2 to " + std::to_string(MOST_TAPS) + " taps, found " + std::to_string(taps));
    if (job.dim < 1 || job.values < 1 || job.heads < 1) wrong("state", "expected heads, keys and values");
    const int64_t keys = job.channels - static_cast<int64_t>(job.heads) * job.values;
    if (keys <= 0 || keys % (2 * job.dim) || job.heads % (keys / (2 * job.dim)))
        wrong("x", std::to_string(job.channels) + " channels are not those of " + std::to_string(job.heads) +
                       " heads with keys of " + std::to_string(job.dim) + " and values of " +
                       std::to_string(job.values));
    return static_cast<int>(keys / (2 * job.dim));
}

void py_delta_rule(handle x_, handle gates_, handle taps_, handle rate, handle bias, bool tiled, handle state_,
                   handle tail_, handle out_, int64_t advance, handle parents, handle scratch) {
    const Array<float> x("x", x_, 2), gates("gates", gates_, 2), state("state", state_, 3), tail("tail", tail_, 2);
    const Array<float> out("out", out_, 2);
    const Array<const float> taps("taps", taps_, 2);
    state.contiguous(3);
    taps.contiguous(2);
    tail.contiguous(2);
    DeltaJob job{};
    job.x = x.data;
    job.x_step = x.step[0];
    job.channels = x.shape[1];
    job.rows = static_cast<int>(x.shape[0]);
    job.heads = static_cast<int>(state.shape[0]);
    job.dim = static_cast<int>(state.shape[1]);
    job.values = static_cast<int>(state.shape[2]);
    job.key_heads = key_heads(job, taps.shape[0]);
    job.taps_count = static_cast<int>(taps.shape[0]);
    taps.expect(1, job.channels);
    tail.expect(0, job.taps_count - 1);
    tail.expect(1, job.channels);
    gates.expect(0, job.rows);
    gates.expect(1, 2 * job.heads);
    out.expect(1, static_cast<int64_t>(job.heads) * job.values);
    if (out.shape[0] > job.rows) wrong("out", "more rows than x has");
    if (advance < 0 || advance > job.rows)
        wrong("advance", "expected 0 to " + std::to_string(job.rows) + ", found " + std::to_string(advance));
    job.taps = taps.data;
    job.gates = gates.data;
    job.gates_step = gates.step[0];
    job.rate = vector_or_null<float>("rate", rate, job.heads);
    job.bias = vector_or_null<float>("bias", bias, job.heads);
    job.tiled = tiled;
    job.state = state.data;
    job.tail = tail.data;
    job.out = out.data;
    job.out_step = out.step[0];
    job.skipped = job.rows - static_cast<int>(out.shape[0]);
    job.advance = static_cast<int>(advance);
    job.parents = parents_of(parents, job.rows - advance);
    if (job.rows == 0) return;
    job.crew = threads();
    const Scratch memory(scratch, delta_rule_scratch_bytes(job.channels, job.taps_count, job.dim, job.crew));
    job.scratch = memory.data();
    Released release;
    delta_rule(job);
}

void py_rms_norm_gated(handle x_, handle gate_, handle weight_, float eps, handle out_) {
    const Array<const float> x("x", x_, 2), gate("gate", gate_, 2);
    const Array<const float> weight("weight", weight_, 1);
    weight.expect(0, x.shape[1]);
    const Array<float> out("out", out_, 2);
    for (int i = 0; i < 2; ++i) {
        gate.expect(i, x.shape[i]);
        out.expect(i, x.shape[i]);
    }
    if (x.size() == 0) return;
    Released release;
    rms_norm_gated(x.data, x.step[0], gate.data, gate.step[0], x.shape[0], static_cast<int>(x.shape[1]), weight.data,
                   eps, out.data, out.step[0]);
}

void py_sigmoid_gate(handle x_, handle gate_) {
    const Array<float> x("x", x_, 2);
    const Array<const float> gate("gate", gate_, 2);
    for (int i = 0; i < 2; ++i) gate.expect(i, x.shape[i]);
    if (x.size() == 0) return;
    Released release;
    sigmoid_gate(x.data, x.step[0], gate.data, gate.step[0], x.shape[0], static_cast<int>(x.shape[1]));
}

}  // namespace

void bind_delta(nb::module_& m) {
    m.def("delta_rule", &py_delta_rule, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none());
    m.def("delta_rule_scratch_bytes", [](int64_t channels, int taps, int dim) {
        return delta_rule_scratch_bytes(channels, taps, dim, threads());
    });
    m.def("rms_norm_gated", &py_rms_norm_gated);
    m.def("sigmoid_gate", &py_sigmoid_gate);
}

}  // namespace flashrt
