// A persistent pool of threads that shares out numbered pieces of one job at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashrt {

// Runs body(context, item, thread) for item in [0, items), in any order; returns when all are done. `thread` is in
// [0, threads()). One job runs at a time: concurrent callers wait for each other.
using Body = void (*)(void* context, int64_t item, int thread);
void parallel(int64_t items, Body body, void* context);

template <typename F>
void parallel_for(int64_t items, F&& body) {
    parallel(
        items, [](void* context, int64_t item, int thread) { (*static_cast<F*>(context))(item, thread); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

void set_threads(int n);
int threads();

// Memory of the calling thread that survives the call: grows when a larger call comes, never shrinks.
// `slot` names independent buffers. 64-byte aligned.
void* scratch(int slot, size_t bytes);

}  // namespace flashrt
