// Reads by threads that block in pread: for kernels without io_uring, and for sandboxes that forbid it.

#include <unistd.h>

#include <cerrno>
#include <deque>

#include "backend.h"
#include "thread.h"

namespace flashrt::io {
namespace {

class Pool final : public Backend {
   public:
    explicit Pool(unsigned depth) : threads_(depth) {}

    const char* name() const override { return "pread"; }

    void start(Source& source) override {
        for (Thread& thread : threads_) thread.start("flashrt-read", [&source] { work(source); });
    }

    void wake() override {}  // the threads wait inside the source

    void stop() override {
        for (Thread& thread : threads_) thread.join();
    }

   private:
    static void work(Source& source) {
        while (Op* op = source.take(true)) {
            int64_t n = copy_cached(op);
            if (n == 0) {
                n = pread(op->file.descriptor, op->to + op->done, op->bytes - op->done, op->offset + op->done);
                if (n < 0) n = -errno;
            }
            source.complete(op, n);
        }
    }

    std::deque<Thread> threads_;
};

}  // namespace

std::unique_ptr<Backend> make_pool(unsigned depth) { return std::make_unique<Pool>(depth); }

}  // namespace flashrt::io
