// Labels of keys are encoded as they come.

#include "ops.h"
#include "pool.h"

namespace flashrt {

void label_append(const LabelJob& job) {
    const Labels& labels = job.labels;
    constexpr int64_t GRAIN = 64;  // tokens that are worth waking a thread for
    parallel_for((job.tokens + GRAIN - 1) / GRAIN, [&](int64_t item, int) {
        for (int64_t t = item * GRAIN; t < job.tokens && t < (item + 1) * GRAIN; ++t)
            for (int h = 0; h < labels.kv_heads; ++h) {
                const size_t own = static_cast<size_t>(h) * labels.channels;
                const int64_t position = job.position + t;
                uint8_t* to = labels.at(h, position / LABEL_TOKENS) + position % LABEL_TOKENS * (LABEL_CHANNELS / 2);
                kernels().encode_label(job.values + t * job.values_step + own, job.low + own, job.step + own,
                                       labels.channels, to);
            }
    });
}

}  // namespace flashrt
