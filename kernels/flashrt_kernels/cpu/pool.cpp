#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flashrt {
namespace {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

constexpr int SPINS = 12000;  // some 200 microseconds: longer than Python takes between kernels; waking takes 50

class Pool {
   public:
    ~Pool() { resize(1); }

    int size() const { return size_.load(std::memory_order_relaxed); }

    void resize(int n) {
        std::lock_guard<std::mutex> job(job_);
        stop_.store(true);
        publish();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
        stop_.store(false);
        const uint64_t now = generation_.load();
        for (int i = 1; i < n; ++i) workers_.emplace_back([this, i, now] { work(i, now); });
        size_.store(n, std::memory_order_relaxed);
    }

    void run(int64_t items, Body body, void* context, int crew) {
        std::lock_guard<std::mutex> job(job_);
        if (workers_.empty() || items < 2 || crew < 2) {
            for (int64_t i = 0; i < items; ++i) body(context, i, 0);
            return;
        }
        body_ = body;
        context_ = context;
        items_ = items;
        crew_ = crew;
        next_.store(0, std::memory_order_relaxed);
        inside_.store(0, std::memory_order_release);
        publish();
        take(0);
        // A worker that has not come yet, because it sleeps or the system runs something else there, is not waited for.
        inside_.fetch_or(CLOSED, std::memory_order_acq_rel);
        for (int spin = 0; inside_.load(std::memory_order_acquire) != CLOSED; ++spin) {
            if (spin < SPINS) relax();
            else std::this_thread::yield();
        }
    }

   private:
    void publish() {
        generation_.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
        { std::lock_guard<std::mutex> lock(sleep_); }
        wake_.notify_all();
    }

    void take(int thread) {
        for (;;) {
            const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
            if (item >= items_) return;
            body_(context_, item, thread);
        }
    }

    void await(uint64_t seen) {
        for (int spin = 0; spin < SPINS; ++spin) {
            if (generation_.load(std::memory_order_acquire) != seen) return;
            relax();
        }
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }

    bool enter() {
        int now = inside_.load(std::memory_order_relaxed);
        while (!(now & CLOSED))
            if (inside_.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) return true;
        return false;
    }

    void work(int thread, uint64_t seen) {
        for (;;) {
            await(seen);
            seen = generation_.load(std::memory_order_acquire);
            if (stop_.load()) return;
            if (!enter()) continue;
            if (thread < crew_) take(thread);
            inside_.fetch_sub(1, std::memory_order_release);
        }
    }

    static constexpr int CLOSED = 1 << 30;

    std::mutex job_;
    std::mutex sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> inside_{CLOSED};  // workers inside the job, and whether it takes no more
    Body body_ = nullptr;
    void* context_ = nullptr;
    int64_t items_ = 0;
    int crew_ = 0;
    std::atomic<int> size_{1};
};

Pool& pool() {
    // Never destroyed: at interpreter exit a daemon thread may still be inside a kernel.
    static Pool* instance = new Pool;
    return *instance;
}

struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(data); }
};

}  // namespace

void parallel(int64_t items, Body body, void* context, int crew) { pool().run(items, body, context, crew); }
void set_threads(int n) { pool().resize(n < 1 ? 1 : n); }
int threads() { return pool().size(); }

void* scratch(int slot, size_t bytes) {
    static thread_local Buffer buffers[4];
    Buffer& buffer = buffers[slot];
    if (buffer.bytes < bytes) {
        std::free(buffer.data);
        buffer.bytes = (bytes + 4095) / 4096 * 4096;
        buffer.data = std::aligned_alloc(64, buffer.bytes);
        if (!buffer.data) {
            buffer.bytes = 0;
            throw std::bad_alloc();
        }
    }
    return buffer.data;
}

}  // namespace flashrt
