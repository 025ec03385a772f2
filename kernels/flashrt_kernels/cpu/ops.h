// The threaded operations that the bindings expose. Shapes have been checked; steps are in elements.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "isa.h"

namespace flashrt {

struct Rows {  // packed rows of `k` weights in bundles
    Codec codec;
    int k;
    const uint8_t* data;
    size_t stride;  // bytes from one bundle to the next
    int64_t bundles;
};

struct Neurons {  // bundles of `group` neurons: their gate rows, if any, their up rows, and down (see rows.py)
    Codec gate, up, down;
    int group, k;
    bool gated;
    const uint8_t* data;
    size_t stride;  // bytes from one bundle to the next
    int64_t bundles;

    size_t up_at() const { return gated ? group * row_bytes(gate, k) : 0; }
    size_t down_at() const { return up_at() + group * row_bytes(up, k); }
    size_t bytes() const {  // of a bundle
        return down_at() + (group == 1 ? row_bytes(down, k) : static_cast<size_t>(k) * row_bytes(down, group));
    }
};

struct LinearJob {
    const float* x;
    size_t x_step;
    int tokens;
    Rows weights;
    float* out;
    size_t out_step;
    int64_t row0, rows;
    const float* bias;
};

struct AddJob {  // y[row0 + r] += x · row r, of tokens that take part: `group` numbers at a time, in ascending order
    const float* x;  // [tokens, k]
    size_t x_step;
    int tokens;
    const int32_t* chosen;  // rows of y that these are; null: the same
    Rows weights;           // a row each
    int group;
    float* y;
    size_t y_step;
    int64_t row0;

    float* to(int64_t token) const { return y + (chosen ? chosen[token] : token) * y_step + row0; }
};

struct HeadsJob {  // rows row0 to row0 + rows of a matrix that has `each` rows for each head: whole bundles
    const float* x;  // [tokens, heads, k]
    size_t x_step, x_head;
    int tokens;
    Rows weights;  // from row0 on
    float* out;    // [tokens, heads, each]
    size_t out_step, out_head;
    int64_t row0, rows, each;
};

struct GluJob {
    const float* x;
    size_t x_step;
    float* y;
    size_t y_step;
    int tokens;
    const int32_t* chosen;  // rows of x and y that take part; null: all
    const float* factors;   // of the h of each token that takes part; null: one
    Neurons neurons;
    std::vector<Neurons> streamed;  // more bundles; all but the last have as many as the first
    const int32_t* slots;        // bundles that take part, in this order, -1 - i being number i streamed; null: all
    int64_t count;               // of them
    Activation activation;
    const float* up_bias;  // of the neurons that take part
    float* usage;          // [count] += the sum of |h| over the tokens and a bundle's neurons; may be null
    const float* gate_bias = nullptr;  // of the neurons that take part

    // h of `n` neurons from `neuron` on, times the factor of a token (null: one), in place of gate (up, where not gated).
    void finish(int64_t neuron, int n, float* gate, float* up, const float* factor) const;
    const uint8_t* bundle(int64_t i) const {
        const int64_t slot = slots ? slots[i] : i;
        if (slot >= 0) return neurons.data + slot * neurons.stride;
        const int64_t place = -1 - slot, each = streamed[0].bundles;
        return streamed[place / each].data + place % each * streamed[place / each].stride;
    }
};

struct ChannelGroups {  // [count] groups of channels, of which `first` is the first
    const uint8_t* data;
    size_t stride;
    int64_t first, count;
    int fine;         // channels of a group that have a fine half
    int64_t columns;  // a multiple of TILE_COLUMNS

    ChannelGroup at(int64_t g) const {
        const uint8_t* base = data + g * stride;
        const size_t step = columns / 4;
        const uint8_t* coarse = base + 2 * columns;
        return {base, base + columns, {coarse, coarse + CHANNELS * step}, step};
    }
};

struct GateUpJob {
    const float* x;
    size_t x_step;
    int tokens;
    ChannelGroups groups;
    const int32_t* order;          // channel at each place of all groups; -1: none
    const float* norms;            // [channels]: |x| times it is what a channel counts
    float coarse_from, fine_from;  // what it must count to take part
    const float* ratio;            // [columns]: unit of an offset over that of a scale
    float* sums;                   // [tokens, columns], in units of `scale` below
    size_t sums_step;
};

struct ChannelCount {
    int64_t coarse = 0, fine = 0;  // halves of channels that took part, over all tokens
};

struct DownJob {
    const float* sums;
    size_t sums_step;
    int tokens;
    bool gated;
    int64_t padded;        // columns of the gate
    const float* scale;    // [columns]
    const float* up_bias;  // [neurons]
    Activation activation;
    const float* norms;  // [neurons]: |h| times it is what a neuron counts
    float from;          // what it must count to take part
    Rows rows;           // one of each neuron from `first` on
    int64_t first;
    float* y;
    size_t y_step;
};

struct AttentionJob {
    const float* q;
    size_t q_step;
    int tokens, heads, kv_heads, dim;
    int values;  // numbers of a value that are summed, the first ones
    const void* kv;  // [kv_heads, context] of keys and values
    KvCodecs codecs;
    int64_t context;
    int start;
    int window;  // 0: unlimited
    float scale, softcap;
    float* out;
    size_t out_step;
    void* scratch;
    int crew;  // threads that `scratch` has room for
    const Tree* tree = nullptr;  // null: tokens follow one another
    float* state = nullptr;      // [tokens, heads, values16 + 2] running softmax over what lies before kv; null: nothing
    size_t state_step = 0;
    bool page = false;   // all tokens see all of kv; the running softmax goes back into `state`, `out` is not written
    bool empty = false;  // nothing is in `state` yet
    bool wide = false;   // part of a pass of many tokens: rounds as these do
    const float* sinks = nullptr;  // [heads]: a score that each head begins with, whose value is zero
};

struct AttentionListJob {
    const float* q;
    size_t q_step;
    int tokens, heads, kv_heads, dim;
    int values;              // see AttentionJob
    const void *near, *far;  // [kv_heads, slots] and [any] of keys and values
    KvCodecs codecs;
    int64_t slots;
    const int32_t* lists;   // [tokens, kv_heads, most]: i >= 0 is near[head, i], -1 - i is far[i]
    const int32_t* counts;  // [tokens, kv_heads]
    int64_t most;
    float scale, softcap;
    float* out;
    size_t out_step;
    void* scratch;
    int crew;
    const float* sinks = nullptr;  // see AttentionJob
};

struct Labels {  // [kv_heads, groups, channels / LABEL_CHANNELS, LABEL_TOKENS, 4]
    uint8_t* data;
    int kv_heads, channels;
    int64_t groups;

    size_t group_bytes() const { return static_cast<size_t>(channels) * LABEL_TOKENS / 2; }
    uint8_t* at(int head, int64_t group) const { return data + (head * groups + group) * group_bytes(); }
};

struct LabelJob {
    const float* values;  // [tokens, kv_heads, channels]
    size_t values_step;
    int tokens;
    const float *low, *step;  // [kv_heads, channels]
    Labels labels;
    int64_t position;
};

struct SelectJob {
    const float* q;  // [tokens, heads, channels]
    size_t q_step;
    int tokens, heads;
    Labels labels;
    const float* step;  // [kv_heads, channels]
    float scale;
    int first;            // candidates are blocks first to ends[token] - 1
    const int32_t* ends;  // [tokens]
    const int32_t* keep;  // [tokens, kv_heads]
    int block;            // tokens of a block
    int32_t* chosen;      // [tokens, kv_heads, most]
    int32_t* counts;      // [tokens, kv_heads]
    int64_t most;
    void* scratch;
};

struct DeltaJob {  // rows of a gated delta net: the first `advance` move the state on, the others leave no trace in it
    float* x;          // [rows, channels]: queries and keys of the key heads, values of the heads; used up
    size_t x_step;
    int64_t channels;
    int rows, heads, key_heads, dim, values, taps_count;
    float* gates;  // [rows, 2 heads]: what is written, what stays; used up
    size_t gates_step;
    const float* taps;         // [taps_count, channels], the oldest row's first
    const float *rate, *bias;  // [heads]
    bool tiled;                // a head's keys are number head % key_heads, or neighbours share
    float* state;              // [heads, dim, values]
    float* tail;               // [taps_count - 1, channels]: the rows before
    float* out;                // [rows - skipped, heads * values]
    size_t out_step;
    int skipped, advance;
    const int32_t* parents;  // [rows - advance]; null: rows follow one another
    void* scratch;
    int crew;
};

void linear(const LinearJob&);
void linear_by_head(const HeadsJob&);  // k of at most WIDEST_HEAD
void glu(const GluJob&);
void glu_groups(const GluJob&);  // `glu` where bundles have more than one neuron
void linear_add(const AddJob&);
ChannelCount gate_up(const GateUpJob&);
// h = act(gate) * up of `count` neurons from `first` on, of one token; `up` [count] is scratch.
void activations(const DownJob&, int token, int64_t first, int count, float* h, float* up);
int64_t down(const DownJob&);  // neurons that took part, over all tokens
size_t gemm_scratch_bytes(int tokens, int k, int64_t neurons, int crew);  // for 0 neurons, of gemm_linear
void gemm_linear_add(const AddJob&, void* scratch, int crew);
void gemm_linear(const LinearJob&, void* scratch, int crew);
void gemm_glu(const GluJob&, void* scratch, int crew);
// All channels and neurons take part, with all that there is of them.
size_t gate_up_scratch_bytes(int tokens, int groups, int crew);
void gemm_gate_up(const GateUpJob&, void* scratch, int crew);
void gemm_down(const DownJob&, void* scratch, int crew);
// Numbers of the running softmax of one query: best score, sum of weights, weighted sum of values.
int attention_state_width(int values);
size_t attention_scratch_bytes(int tokens, int heads, int kv_heads, int dim, int crew);
void attention(const AttentionJob&);
size_t attention_list_scratch_bytes(int tokens, int heads, int kv_heads, int dim, int crew);
void attention_list(const AttentionListJob&);
void label_append(const LabelJob&);
size_t select_scratch_bytes(int heads, int kv_heads, int64_t context, int block);
void select(const SelectJob&);
// v is not read where the cache holds keys alone.
void kv_append(const float* k, size_t k_step, const float* v, size_t v_step, int tokens, int kv_heads, int dim,
               void* kv, KvCodecs codecs, int64_t context, int64_t start);
void rms_norm(const float* x, size_t x_step, int64_t n, int k, const float* weight, float eps, float* out,
              size_t out_step);
void layer_norm(const float* x, size_t x_step, int64_t n, int k, const float* weight, const float* bias, float eps,
                float* out, size_t out_step);
void rope(float* x, size_t token_step, size_t head_step, int tokens, int heads, int dim, const float* cos,
          const float* sin);
size_t delta_rule_scratch_bytes(int64_t channels, int taps, int dim, int crew);
void delta_rule(const DeltaJob&);
void rms_norm_gated(const float* x, size_t x_step, const float* gate, size_t gate_step, int64_t n, int k,
                    const float* weight, float eps, float* out, size_t out_step);
void activate(Activation activation, float* gate, size_t gate_step, const float* up, size_t up_step, int64_t n, int k);
void sigmoid_gate(float* x, size_t x_step, const float* gate, size_t gate_step, int64_t n, int k);
void quantize(Codec, const float* w, int64_t n, int k, const float* importance, uint8_t* out, size_t stride);
void dequantize(Codec, const uint8_t* rows, size_t stride, int64_t n, int k, float* out, size_t out_step);
uint64_t read_all(const void* data, size_t bytes);

// Bytes that the small-batch kernels keep per calling thread, for `k` columns.
size_t reserve(int k);
size_t reserve_groups();  // beside these, where bundles have more than one neuron

}  // namespace flashrt
