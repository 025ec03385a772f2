// Order among threads without a barrier.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace flashrt {

// Lets pieces of work pass one by one in their order. They are handed out in that order, so the next one is under way.
class Turnstile {
   public:
    void enter(int64_t item) const {
        for (int spin = 0; next_.load(std::memory_order_acquire) != item; ++spin)
            if (spin > 1000) std::this_thread::yield();
    }
    void leave(int64_t item) { next_.store(item + 1, std::memory_order_release); }

   private:
    std::atomic<int64_t> next_{0};
};

}  // namespace flashrt
