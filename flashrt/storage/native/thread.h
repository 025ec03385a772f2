// A thread with a small stack that no signal is delivered to.
#pragma once

#include <pthread.h>

#include <functional>

namespace flashrt::io {

class Thread {
   public:
    Thread() = default;
    Thread(const Thread&) = delete;
    Thread& operator=(const Thread&) = delete;
    ~Thread() { join(); }

    // Throws std::system_error when the system refuses another thread.
    void start(const char* name, std::function<void()> body);
    void join();

   private:
    std::function<void()> body_;
    pthread_t thread_{};
    bool running_ = false;
};

}  // namespace flashrt::io
