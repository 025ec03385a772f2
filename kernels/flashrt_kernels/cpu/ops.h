// The threaded operations that the bindings expose. Shapes have been checked; steps are in elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace flashrt {

struct Rows {  // packed rows of `k` weights in bundles
    Codec codec;
    int k;
    const uint8_t* data;
    size_t stride;  // bytes from one bundle to the next
    int64_t bundles;
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

struct GluJob {
    const float* x;
    size_t x_step;
    float* y;
    size_t y_step;
    int tokens;
    const int32_t* chosen;  // rows of x and y that take part; null: all
    const float* weights;   // of the tokens that take part; null: one
    Rows neurons;
    const int32_t* slots;  // bundles that take part, in this order; null: all
    int64_t count;         // of them
    Activation activation;
    bool gated;
    const float* up_bias;
};

struct AttentionJob {
    const float* q;
    size_t q_step;
    int tokens, heads, kv_heads, dim;
    const void* kv;
    bool half;
    int64_t context;
    int start;
    int window;  // 0: unlimited
    float scale, softcap;
    float* out;
    size_t out_step;
    void* scratch;
    int crew;  // threads that `scratch` has room for
};

void linear(const LinearJob&);
void glu(const GluJob&);
size_t gemm_scratch_bytes(int tokens, int k, int64_t neurons, int crew);
void gemm_linear(const LinearJob&, void* scratch, int crew);
void gemm_glu(const GluJob&, void* scratch, int crew);
size_t attention_scratch_bytes(int tokens, int heads, int kv_heads, int dim, int crew);
void attention(const AttentionJob&);
void kv_append(const float* k, size_t k_step, const float* v, size_t v_step, int tokens, int kv_heads, int dim,
               void* kv, bool half, int64_t context, int64_t start);
void rms_norm(const float* x, size_t x_step, int64_t n, int k, const float* weight, float eps, float* out,
              size_t out_step);
void layer_norm(const float* x, size_t x_step, int64_t n, int k, const float* weight, const float* bias, float eps,
                float* out, size_t out_step);
void rope(float* x, size_t token_step, size_t head_step, int tokens, int heads, int dim, const float* cos,
          const float* sin);
void quantize(Codec, const float* w, int64_t n, int k, const float* importance, uint8_t* out, size_t stride);
void dequantize(Codec, const uint8_t* rows, size_t stride, int64_t n, int k, float* out, size_t out_step);
uint64_t read_all(const void* data, size_t bytes);

// Bytes that the small-batch kernels keep per calling thread, for `k` columns.
size_t reserve(int k);

}  // namespace flashrt
