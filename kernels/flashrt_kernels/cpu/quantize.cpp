#include "ops.h"
#include "pool.h"

namespace flashrt {

void quantize(Codec codec, const float* w, int64_t n, int k, const float* importance, uint8_t* out, size_t stride) {
    const int64_t grain = 1 + 16384 / k;
    parallel_for((n + grain - 1) / grain, [&](int64_t item, int) {
        const int64_t first = item * grain, count = n - first < grain ? n - first : grain;
        kernels().quantize(codec, w + first * k, count, k, importance, out + first * stride, stride);
    });
}

}  // namespace flashrt
