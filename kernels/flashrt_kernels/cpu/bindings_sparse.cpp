// Python entry points of what attends to chosen tokens; see bindings.cpp.

#include <cmath>
#include <string>
#include <tuple>

#include "arguments.h"
#include "ops.h"
#include "pool.h"

namespace flashrt {
namespace {

using nb::handle;
using Released = nb::gil_scoped_release;

Labels labels_of(handle object, int64_t channels) {
    if (channels < LABEL_CHANNELS || channels % LABEL_CHANNELS || channels > WIDEST_HEAD)
        wrong("step", "expected a multiple of " + std::to_string(LABEL_CHANNELS) + " channels, " +
                          std::to_string(WIDEST_HEAD) + " at most, found " + std::to_string(channels));
    const Array<uint8_t> labels("labels", object, 5);
    labels.contiguous(5);
    labels.expect(2, channels / LABEL_CHANNELS);
    labels.expect(3, LABEL_TOKENS);
    labels.expect(4, LABEL_CHANNELS / 2);
    return {labels.data, static_cast<int>(labels.shape[0]), static_cast<int>(channels), labels.shape[1]};
}

// [kv_heads, channels] of a number for each channel.
const float* channels_of(const char* name, handle object, const Labels& labels, bool positive) {
    const Array<const float> numbers(name, object, 2);
    numbers.contiguous(2);
    numbers.expect(0, labels.kv_heads);
    numbers.expect(1, labels.channels);
    for (int64_t i = 0; i < numbers.size(); ++i)
        if (!std::isfinite(numbers.data[i]) || (positive && numbers.data[i] <= 0))
            wrong(name, std::string("expected ") + (positive ? "positive" : "finite") + " numbers, found " +
                            std::to_string(numbers.data[i]));
    return numbers.data;
}

void py_label_append(handle values_, handle low, handle step_, handle labels_, int64_t position) {
    const Array<const float> values("values", values_, 3), step("step", step_, 2);
    values.contiguous(2);
    const Labels labels = labels_of(labels_, step.shape[1]);
    values.expect(1, labels.kv_heads);
    values.expect(2, labels.channels);
    const int64_t context = labels.groups * LABEL_TOKENS;
    if (position < 0 || position > context - values.shape[0])
        wrong("position", std::to_string(values.shape[0]) + " labels from " + std::to_string(position) +
                              " are outside a context of " + std::to_string(context));
    const LabelJob job = {values.data, static_cast<size_t>(values.step[0]), static_cast<int>(values.shape[0]),
                          channels_of("low", low, labels, false), channels_of("step", step_, labels, true), labels,
                          position};
    Released release;
    label_append(job);
}

void check_block(int64_t block) {
    if (block < 1 || block > LABEL_TOKENS || LABEL_TOKENS % block)
        wrong("block", "expected a divisor of " + std::to_string(LABEL_TOKENS) + ", found " + std::to_string(block));
}

size_t py_select_scratch_bytes(int64_t heads, int64_t kv_heads, int64_t context, int64_t block) {
    check_block(block);
    return select_scratch_bytes(static_cast<int>(heads), shared("kv_heads", heads, kv_heads), context,
                                static_cast<int>(block));
}

// Candidates are blocks that the labels have, and there is room for those to be kept.
void check_choice(const SelectJob& job, int64_t blocks) {
    const int heads = job.labels.kv_heads;
    for (int t = 0; t < job.tokens; ++t) {
        if (job.ends[t] < 0 || job.ends[t] > blocks)
            wrong("ends", "expected 0 to " + std::to_string(blocks) + " blocks, found " + std::to_string(job.ends[t]));
        for (int h = 0; h < heads; ++h) {
            const int64_t keep = job.keep[t * heads + h], candidates = job.ends[t] - job.first;
            if (keep < 0) wrong("keep", "expected no negative numbers, found " + std::to_string(keep));
            if (keep > job.most && candidates > job.most)
                wrong("chosen", "has room for " + std::to_string(job.most) + " blocks, found " + std::to_string(keep) +
                                    " to keep of " + std::to_string(candidates));
        }
    }
}

void py_select(handle q_, handle labels_, handle step_, float scale, int64_t first, handle ends_, handle keep_,
               int64_t block, handle chosen_, handle counts_, handle scratch) {
    const Array<const float> q("q", q_, 3), step("step", step_, 2);
    q.contiguous(2);
    const Labels labels = labels_of(labels_, step.shape[1]);
    q.expect(2, labels.channels);
    const int heads = static_cast<int>(q.shape[1]);
    shared("labels", heads, labels.kv_heads);
    if (!(scale > 0) || !std::isfinite(scale))
        wrong("scale", "expected a positive number, found " + std::to_string(scale));
    check_block(block);
    const int64_t blocks = labels.groups * LABEL_TOKENS / block;
    if (first < 0 || first > blocks)
        wrong("first", "expected 0 to " + std::to_string(blocks) + ", found " + std::to_string(first));
    const Array<const int32_t> ends("ends", ends_, 1), keep("keep", keep_, 2);
    const Array<int32_t> chosen("chosen", chosen_, 3), counts("counts", counts_, 2);
    ends.expect(0, q.shape[0]);
    keep.contiguous(2);
    chosen.contiguous(3);
    counts.contiguous(2);
    for (int64_t dimension : {0, 1}) {
        const int64_t length = dimension ? labels.kv_heads : q.shape[0];
        keep.expect(static_cast<int>(dimension), length);
        chosen.expect(static_cast<int>(dimension), length);
        counts.expect(static_cast<int>(dimension), length);
    }
    SelectJob job = {q.data, static_cast<size_t>(q.step[0]), static_cast<int>(q.shape[0]), heads, labels,
                     channels_of("step", step_, labels, true), scale, static_cast<int>(first), ends.data, keep.data,
                     static_cast<int>(block), chosen.data, counts.data, chosen.shape[2], nullptr};
    check_choice(job, blocks);
    const int64_t context = labels.groups * LABEL_TOKENS;
    const Scratch memory(scratch, select_scratch_bytes(heads, labels.kv_heads, context, job.block));
    job.scratch = memory.data();
    Released release;
    select(job);
}

struct Far {  // tokens, of the same kind as near
    const void* data = nullptr;
    int64_t tokens = 0;

    Far(handle object, const Cache& near, int dim) {
        if (object.is_none()) return;
        const Cache far("far", object, dim, 1);
        if (far.codecs.key != near.codecs.key || far.codecs.value != near.codecs.value ||
            far.codecs.keys_only != near.codecs.keys_only)
            wrong("far", "expected keys and values as near has them");
        data = far.data;
        tokens = far.shape[0];
    }
};

void check_lists(const AttentionListJob& job, int64_t far) {
    for (int i = 0; i < job.tokens * job.kv_heads; ++i) {
        if (job.counts[i] < 0 || job.counts[i] > job.most)
            wrong("counts", "expected 0 to " + std::to_string(job.most) + ", found " + std::to_string(job.counts[i]));
        int32_t low = 0, high = -1;
        for (int j = 0; j < job.counts[i]; ++j) {
            const int32_t at = job.lists[i * job.most + j];
            low = at < low ? at : low;
            high = at > high ? at : high;
        }
        if (low < -far || high >= job.slots)
            wrong("lists", "expected numbers of " + std::to_string(-far) + " to below " + std::to_string(job.slots) +
                               ", found " + std::to_string(low < -far ? low : high));
    }
}

void py_attention_list(handle q_, handle near_, handle far_, handle lists_, handle counts_, float scale, float softcap,
                       handle out_, handle scratch, handle sinks) {
    const Queries q(q_);
    const auto [tokens, heads, dim] = std::tuple(q.tokens, q.heads, q.dim);
    const Cache near("near", near_, dim);
    const int kv_heads = shared("near", heads, near.shape[0]);
    const Far far(far_, near, dim);
    const Array<const int32_t> lists("lists", lists_, 3), counts("counts", counts_, 2);
    lists.contiguous(3);
    counts.contiguous(2);
    for (const auto* each : {&lists, &counts}) {
        each->expect(0, tokens);
        each->expect(1, kv_heads);
    }
    const Array<float> out("out", out_, 2);
    out.expect(0, tokens);
    const int values = values_of("out", out.shape[1], heads, dim);
    if (tokens == 0 || heads == 0) return;
    const int crew = threads();
    const Scratch memory(scratch, attention_list_scratch_bytes(tokens, heads, kv_heads, dim, crew));
    const AttentionListJob job = {q.data, q.step, tokens, heads, kv_heads, dim, values, near.data, far.data,
                                  near.codecs, near.shape[1], lists.data, counts.data, lists.shape[2], scale,
                                  softcap, out.data, static_cast<size_t>(out.step[0]), memory.data(), crew,
                                  vector_or_null<float>("sinks", sinks, heads)};
    check_lists(job, far.tokens);
    Released release;
    attention_list(job);
}

}  // namespace

void bind_sparse(nb::module_& m) {
    m.def("label_append", &py_label_append);
    m.def("select", &py_select, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg(), nb::arg().none());
    m.def("select_scratch_bytes", &py_select_scratch_bytes);
    m.def("attention_list", &py_attention_list, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none());
    m.def("attention_list_scratch_bytes", [](int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim) {
        return attention_list_scratch_bytes(static_cast<int>(tokens), static_cast<int>(heads),
                                            shared("kv_heads", heads, kv_heads), static_cast<int>(dim), threads());
    });
}

}  // namespace flashrt
