#include "ops.h"
#include "pool.h"

namespace flashrt {

void quantize(Codec codec, const float* w, int64_t n, int k, const float* importance, uint8_t* out, size_t stride) {
    const int64_t grain = 1 + 16384 / k;
    parallel_for((n + grain - 1) / grain, [&](int64_t item, int) {
        for (int64_t i = item * grain; i < n && i < (item + 1) * grain; ++i)
            kernels().quantize(codec, w + i * k, importance, k, out + i * stride);
    });
}

}  // namespace flashrt
