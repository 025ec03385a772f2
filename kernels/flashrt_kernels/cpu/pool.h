// A persistent pool of threads that shares out numbered pieces of one job at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashrt {

// Runs body(context, item, thread) for item in [0, items), handed out in this order; returns when all are done. `thread`
// is in [0, crew): whoever keeps memory for each thread says for how many, as another caller may add threads meanwhile.
// One job runs at a time: concurrent callers wait for each other.
using Body = void (*)(void* context, int64_t item, int thread);
void parallel(int64_t items, Body body, void* context, int crew);

constexpr int ALL = 1 << 20;

template <typename F>
void parallel_for(int64_t items, F&& body, int crew = ALL) {
    parallel(
        items, [](void* context, int64_t item, int thread) { (*static_cast<F*>(context))(item, thread); },
        const_cast<void*>(static_cast<const void*>(&body)), crew);
}

void set_threads(int n);
int threads();

// Memory of the calling thread that survives the call: grows when a larger call comes, never shrinks.
// `slot` names independent buffers. 64-byte aligned.
void* scratch(int slot, size_t bytes);

}  // namespace flashrt
