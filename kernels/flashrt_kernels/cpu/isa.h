// The kernels of one instruction set, as a table; the threaded drivers call through it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec.h"
#include "stored.h"

namespace flashrt {

enum class Function : int { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3, RELU2 = 4, CLAMPED_SWIGLU = 5 };

struct Activation {
    Function function;
    float threshold;  // RELU passes what is more; CLAMPED_SWIGLU multiplies what the sigmoid takes by it
    float limit = 0;  // CLAMPED_SWIGLU bounds gate and up to it
};

// Up to NARROW_TOKENS tokens' activations, padded with zeros to `kp`. Float codecs use `f`, int8 rows the 16-bit codes
// `q`: x = scale * q, one scale per chunk of 64. For int4 and kept rows q holds bytes instead (see activations.h).
struct Tokens {
    int count, k, kp;
    float* f;       // [count, f_step]
    int16_t* q;     // [count, q_step]
    float* scales;  // [count, scale_step]
    float* sums;    // [count, sum_step]: of int4, sum of x over each INT4_GROUP
    size_t f_step, q_step, scale_step, sum_step;
    int each;       // of kept rows: numbers that share a scale; 64, 128 or 256
};

constexpr int GATHER = 32;  // bundles of one call, at most

struct Bundles {  // the first `rows` rows of `count` bundles, wherever they lie
    const uint8_t* const* at;
    const uint8_t* const* next;  // what to prefetch meanwhile, bundle by bundle
    int count, rows;
};

struct DotOut {  // of bundle b, row r and token t: data[b * bundle_step + r * row_step + t * token_step]
    float* data;
    size_t bundle_step, row_step, token_step;
};

struct ChannelGroup {
    const uint8_t *a, *b;    // [columns]: codes of scales and offsets
    const uint8_t* half[2];  // coarse [32, step], fine [fine channels, step]
    size_t step;             // bytes from one channel to the next

    ChannelGroup from_tile(int64_t tile) const {
        return {a + 256 * tile, b + 256 * tile, {half[0] + 64 * tile, half[1] + 64 * tile}, step};
    }
};

struct ActiveChannels {  // of one token and group
    int count[2];                   // with a coarse half, with a fine one
    uint8_t channel[2][CHANNELS];   // which; padded to a multiple of four
    int32_t x[2][CHANNELS / 4];     // their x, four signed bytes each
    int32_t middle;                 // what stands for the fine halves left out: 3 / 2 of the sum of their x, doubled
    float scale, sum;               // of x's codes; the sum of x
};

// Weights of a wide multiplication: [columns / 16][depth][16] float, or [columns / 16][depth / 2][16][2] bfloat16.
constexpr int PANEL = 64;  // columns of one panel
constexpr int TILE = 96;   // tokens that are multiplied by a panel at a time: whole register tiles of any kind

// Tokens of a pass that are alternatives: each follows its parent, a token before it, or the sequence. They are stored
// one after the other behind the sequence, but the position of a token is the number of tokens that it follows.
struct Tree {
    int nodes;
    int depth[NARROW_TOKENS];         // tokens of the pass that node i follows
    int above[NARROW_TOKENS][NARROW_TOKENS];  // [i][d]: the node at depth d on the way to node i, which is the last one

    Tree(const int32_t* parents, int nodes) : nodes(nodes) {  // -1: follows the sequence
        for (int i = 0; i < nodes; ++i) {
            depth[i] = parents[i] < 0 ? 0 : depth[parents[i]] + 1;
            for (int d = 0; d < depth[i]; ++d) above[i][d] = above[parents[i]][d];
            above[i][depth[i]] = i;
        }
    }
};

struct Segment {  // one (KV head, segment of positions) against a tile of queries
    const void* kv;        // keys and values of the KV head's slots
    const void* const* pairs;  // [end + POSITIONS]: where each slot's key and value lie instead; null: in `kv`
    KvCodecs codecs;
    size_t key_bytes, pair_bytes;  // of a slot
    int dim;               // D
    int values;            // V: numbers of a value that are summed, the first ones
    int begin, end;        // slots that some query of the tile sees; without a tree those are positions
    int origin, lanes;     // positions that some query sees
    const Tree* tree;      // whose node 0 is in slot `start`; null: none, or it begins behind this segment
    int start;
    int token, group;      // the first query's token, and the queries of a token
    int queries;           // rows of q
    float* q;              // [queries, D], scaled; used up
    const int* first;      // [queries]: first visible position
    const int* last;       // [queries]: last visible position
    float softcap;         // 0: none
    bool wide;             // may be computed by kernels that only passes of many tokens use
    float* panel;          // scratch: POSITIONS * (D rounded up to 16) floats
    float* scores;         // scratch: [queries, SCORES]
    float* best;           // out [queries]: highest score, -inf when nothing is visible
    float* total;          // out [queries]: sum of exp(score - best)
    float* acc;            // out [queries, values16]: sum of exp(score - best) * v; values16 is V rounded up to 16

    void hold(KvCodecs held, int head_dim, int summed) {
        codecs = held;
        dim = head_dim;
        values = summed;
        key_bytes = kv_row_bytes(held.key, head_dim);
        pair_bytes = kv_pair_bytes(held, head_dim);
    }
};

constexpr int SCORES = ATTENTION_SEGMENT + NARROW_TOKENS;  // slots at most: a tree may lie beyond the segment of its positions
constexpr int POSITIONS = 32;  // packed at a time: their panel stays in the first-level cache

constexpr int LABEL_CHUNK = 256;  // tokens whose labels are scored together, from multiples of it on

struct LabelChunk {  // of one KV head, against the queries of a token
    const uint8_t* labels;  // [LABEL_CHUNK / 16, channels / 8, 16, 4]
    int channels;
    int begin, end;         // tokens of the chunk that are candidates
    int block;              // tokens of a block, which divide 16
    int queries;
    const int8_t* codes;    // [queries, channels]: the queries in steps of the labels, and of a scale each
    const float* scales;    // [queries]: of the scores, as powers of two
    float* best;            // out [queries, step]: highest score, as a whole power of two
    float* total;           // out [queries, step]: sum of 2^(score - best)
    size_t step;
    float* sums;            // out [queries, LABEL_CHUNK / block]: the same of each block
};

struct LabelScores {  // of all chunks of one KV head
    int chunks, queries, block;
    float* best;          // [queries, step], used up
    const float* total;
    size_t step;
    const float* sums;    // [chunks, queries, LABEL_CHUNK / block]
    float* weights;       // out [chunks, LABEL_CHUNK / block]: softmax of each query, summed
};

struct DeltaStep {  // of one row, over 16 columns of a head's state
    const float* from;  // [dim, 16]
    float* to;          // [dim, 16], may be `from`
    int dim, lanes;
    const float *query, *key;  // [dim]
    const float* value;        // [lanes]
    float beta, decay;         // the share that is written, and the share that stays
    float* out;                // [lanes]; may be null
};

struct Kernels {
    const char* name;
    bool half_gemm;  // wide multiplications of the coded weights run in bfloat16

    void (*prepare)(Codec, const float* x, int token, Tokens&);
    // Numbers [from, from + n) of a token, for kept rows; `from` is a multiple of Tokens::each.
    void (*prepare_kept)(const float* x, int from, int n, int token, Tokens&);
    // Row r of bundle b · token t.
    void (*dots)(Codec, const Bundles&, const Tokens&, const DotOut&);
    // y[t * y_step + ...] += h[t * h_step + i] * the row `offset` bytes into bundle i. y has room for whole spans and an order of its
    // own, which `collect` knows when it is told how many tokens there were: out[0..k) += y of one of them.
    void (*axpys)(Codec, const Bundles&, size_t offset, int k, const float* h, size_t h_step, int tokens, float* y,
                  size_t y_step);
    void (*collect)(Codec, int tokens, const float* y, int k, float* out);
    // A token's x and what it wants of each channel, both [CHANNELS].
    void (*choose_channels)(const float* x, const uint8_t* wanted, ActiveChannels&);
    // sums[c] += group · token for the columns of tiles [from, to); `next`, to be fetched meanwhile, may be null.
    void (*add_channels)(const ChannelGroup&, const ActiveChannels&, const ChannelGroup& next,
                         const ActiveChannels& after, int from, int to, const float* ratio, float* sums);
    // gate[i] = act(gate[i]) * up[i]; up may be null
    void (*activate)(Activation, float* gate, const float* up, int n);

    void (*to_half)(const float* x, int n, uint16_t* out);
    // A key or a value of a head.
    void (*encode_kv)(Codec codec, const float* x, int dim, void* to);
    // Packs `count` <= 16 rows, columns [from, to) of the row, into one 16-column stripe of a panel.
    void (*pack_across)(Codec, const uint8_t* const* rows, int count, int k, int from, int to, bool half, void* stripe);
    // Packs chunk `chunk` of `count` rows into the four stripes of a panel whose depth is `count` (rounded up to even).
    void (*pack_along)(Codec, const uint8_t* rows, size_t stride, int count, int k, int chunk, bool half, void* panel);
    // Packs 64 columns of all channels of a group, whose first `fine` have both halves, into four stripes likewise.
    void (*pack_channels)(const ChannelGroup&, int fine, size_t column, const float* ratio, bool half, void* panel,
                          size_t stripe);
    // c[m][0..63] (+)= a[m] · panel, for m < rows <= TILE. a: [rows, a_step] of float or bfloat16. `depth` in weights.
    void (*tile)(bool half, int rows, const void* a, size_t a_step, const void* panel, size_t stripe_bytes, int depth,
                 float* const* c, bool accumulate);

    void (*attend)(const Segment&);
    // (best, total, acc) of a query absorb those of a later segment
    void (*merge)(int dim16, float* best, float* total, float* acc, float best2, float total2, const float* acc2);

    // One token's labels: four bytes for each eight channels, LABEL_TOKENS * 4 bytes apart.
    void (*encode_label)(const float* values, const float* low, const float* step, int channels, uint8_t* to);
    // A query in steps of the labels: its codes, and their scale.
    float (*encode_query)(const float* q, const float* step, int channels, int8_t* codes);
    void (*score_labels)(const LabelChunk&);
    void (*weigh_blocks)(const LabelScores&);

    void (*rms_norm)(const float* x, const float* weight, int k, float eps, float* out);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, int k, float eps, float* out);
    void (*rope)(float* x, const float* cos, const float* sin, int half);
    // x[0..n) = silu(sum of taps [count, tap_step] times rows [count], the newest row first and its tap last).
    void (*convolve)(const float* const* rows, const float* taps, size_t tap_step, int count, int n, float* x);
    void (*l2_norm)(float* x, int k, float scale);  // in place, times scale
    void (*delta_step)(const DeltaStep&);
    void (*rms_norm_gated)(const float* x, const float* gate, const float* weight, int k, float eps, float* out);
    void (*sigmoid_gate)(float* x, const float* gate, int k);
    // Rows w [n, k] to rows that lie `stride` bytes apart.
    void (*quantize)(Codec, const float* w, int64_t n, int k, const float* importance, uint8_t* out, size_t stride);
    void (*dequantize)(Codec, const uint8_t* row, int k, float* out);
    void (*decode_stored)(Stored, const uint8_t* data, int64_t blocks, float* out);
    bool (*finite)(const float* values, int64_t n);
    uint64_t (*read)(const void* data, size_t bytes);
};

const Kernels& kernels();
const char* isa();
// Uses the named instruction set, or the best for nullptr. False: unknown or not available on this machine.
bool force_isa(const char* name);
int available_isas(const char** names, int room);

}  // namespace flashrt
