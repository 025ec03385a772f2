// Reads by io_uring, through system calls of its own: one thread submits and reaps, and sleeps in the kernel otherwise.

#include "backend.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)

#include <linux/io_uring.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "thread.h"

namespace flashrt::io {
namespace {

// Of Linux 6.1: completions are worked on when the one thread that submits asks for them, and interrupt nobody.
// Headers may be older than the kernel.
constexpr unsigned SETUP_R_DISABLED = 1u << 6;
constexpr unsigned SETUP_SINGLE_ISSUER = 1u << 12;
constexpr unsigned SETUP_DEFER_TASKRUN = 1u << 13;
constexpr unsigned REGISTER_ENABLE_RINGS = 12;
constexpr unsigned FEAT_FAST_POLL = 1u << 5;  // of Linux 5.7: plain reads and single maps came before

constexpr unsigned GROUP = 4;  // reads that are worth a system call

int setup(unsigned entries, io_uring_params* params) {
    return static_cast<int>(syscall(SYS_io_uring_setup, entries, params));
}

int enter(int ring, unsigned submit, unsigned wait) {
    return static_cast<int>(syscall(SYS_io_uring_enter, ring, submit, wait, IORING_ENTER_GETEVENTS, nullptr, 0));
}

class Map {
   public:
    Map() = default;
    Map(const Map&) = delete;
    Map& operator=(const Map&) = delete;
    ~Map() {
        if (data_ != MAP_FAILED) munmap(data_, bytes_);
    }

    bool map(int ring, size_t bytes, off_t which) {
        bytes_ = bytes;
        data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, which);
        return data_ != MAP_FAILED;
    }

    template <typename T>
    T* at(size_t offset) const {
        return reinterpret_cast<T*>(static_cast<char*>(data_) + offset);
    }

   private:
    void* data_ = MAP_FAILED;
    size_t bytes_ = 0;
};

class Descriptor {
   public:
    Descriptor() = default;
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    ~Descriptor() {
        if (value >= 0) close(value);
    }

    int value = -1;
};

class Uring final : public Backend {
   public:
    explicit Uring(unsigned depth) : depth_(depth) { landed_.reserve(depth); }

    // Whether the kernel gives a ring; errno says why not.
    bool open() {
        io_uring_params params{};
        params.flags = SETUP_R_DISABLED | SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN;
        ring_.value = setup(depth_ + 1, &params);  // one more: what waits for `wake`
        disabled_ = ring_.value >= 0;
        if (ring_.value < 0 && errno == EINVAL) {  // a kernel that lacks them
            params = {};
            ring_.value = setup(depth_ + 1, &params);
        }
        if (ring_.value < 0 || forbidden()) return false;
        if (!(params.features & IORING_FEAT_SINGLE_MMAP) || !(params.features & FEAT_FAST_POLL)) {
            errno = ENOSYS;
            return false;
        }
        woken_.value = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        const size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(unsigned);
        const size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
        if (woken_.value < 0 || !rings_.map(ring_.value, sq_bytes > cq_bytes ? sq_bytes : cq_bytes, IORING_OFF_SQ_RING) ||
            !entries_.map(ring_.value, params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES))
            return false;
        sq_tail_ = rings_.at<unsigned>(params.sq_off.tail);
        sq_mask_ = *rings_.at<unsigned>(params.sq_off.ring_mask);
        sq_array_ = rings_.at<unsigned>(params.sq_off.array);
        cq_head_ = rings_.at<unsigned>(params.cq_off.head);
        cq_tail_ = rings_.at<unsigned>(params.cq_off.tail);
        cq_mask_ = *rings_.at<unsigned>(params.cq_off.ring_mask);
        cqes_ = rings_.at<io_uring_cqe>(params.cq_off.cqes);
        return true;
    }

    const char* name() const override { return "io_uring"; }

    void start(Source& source) override {
        thread_.start("flashrt-read", [this, &source] { run(source); });
    }

    void wake() override {
        if (asleep_.exchange(false)) signal();
    }

    void stop() override {
        stopping_.store(true);
        signal();
        thread_.join();
    }

   private:
    // Whether a sandbox lets rings be made but not used. What is asked here is wrong, so only a sandbox says EPERM.
    bool forbidden() const {
        if (enter(ring_.value, 0, 0) < 0 && (errno == EPERM || errno == EACCES || errno == ENOSYS)) return true;
        const long known = syscall(SYS_io_uring_register, ring_.value, ~0u, nullptr, 0);
        return known < 0 && (errno == EPERM || errno == EACCES || errno == ENOSYS);
    }

    [[noreturn]] static void give_up(const char* call) {
        std::fprintf(stderr, "flashrt: %s failed: %s\n", call, std::strerror(errno));
        std::abort();
    }

    void run(Source& source) {
        if (disabled_ && syscall(SYS_io_uring_register, ring_.value, REGISTER_ENABLE_RINGS, nullptr, 0) < 0)
            give_up("io_uring_register");  // the kernel made the ring for this very call
        watch();
        while (!stopping_.load()) {
            fill(source);
            if (landed_.empty()) sleep(source);
            else work_off(source);
            reap();
        }
    }

    // Submits, and returns when a read is over or somebody calls `wake`.
    void sleep(Source& source) {
        if (in_flight_ < depth_) {
            asleep_.store(true);
            fill(source);  // what came before anybody could see that this thread is about to sleep
        }
        if (landed_.empty()) submit(1);
        asleep_.store(false);
    }

    // Hands results over. What is to be read next goes first where the disk would have too little to do meanwhile;
    // otherwise it goes with the system call that waits.
    void work_off(Source& source) {
        if (2 * unsubmitted_ > in_flight_) submit(0);
        for (size_t i = 0; i < landed_.size(); ++i) {  // `fill` adds what the page cache holds
            const auto [op, result] = landed_[i];
            source.complete(op, result);
            fill(source);  // with the staging memory that has come free
            if (unsubmitted_ >= GROUP) submit(0);
        }
        landed_.clear();
    }

    void fill(Source& source) {
        while (in_flight_ + landed_.size() < depth_) {
            Op* op = source.take(false);
            if (!op) return;
            if (const int64_t cached = copy_cached(op)) {
                landed_.emplace_back(op, static_cast<int>(cached));
                continue;
            }
            read(op);
            ++in_flight_;
        }
    }

    void read(Op* op) {
        io_uring_sqe entry{};
        entry.opcode = IORING_OP_READ;
        entry.fd = op->file.descriptor;
        entry.addr = reinterpret_cast<uint64_t>(op->to + op->done);
        entry.len = static_cast<uint32_t>(op->bytes - op->done);
        entry.off = op->offset + op->done;
        entry.user_data = reinterpret_cast<uint64_t>(op);
        push(entry);
    }

    // Have `wake` end a wait. A poll, not a read: one that is pending when the ring goes must not write to memory.
    void watch() {
        io_uring_sqe entry{};
        entry.opcode = IORING_OP_POLL_ADD;
        entry.fd = woken_.value;
        entry.poll_events = POLLIN;
        push(entry);
    }

    void push(const io_uring_sqe& entry) {
        const unsigned tail = *sq_tail_;  // written by this thread only
        *entries_.at<io_uring_sqe>((tail & sq_mask_) * sizeof entry) = entry;
        sq_array_[tail & sq_mask_] = tail & sq_mask_;
        __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
        ++unsubmitted_;
    }

    // In groups, so that the disk begins with the first while the next are being prepared: small reads are 20% faster.
    void submit(unsigned wait) {
        while (unsubmitted_ > GROUP && issue(GROUP, 0)) {
        }
        issue(unsubmitted_, wait);
    }

    bool issue(unsigned count, unsigned wait) {
        const int taken = enter(ring_.value, count, wait);
        if (taken >= 0) unsubmitted_ -= static_cast<unsigned>(taken);
        else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) give_up("io_uring_enter");  // the entries are still ours
        return taken > 0;
    }

    void reap() {
        unsigned head = *cq_head_;
        const unsigned tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE);
        for (; head != tail; ++head) {
            const io_uring_cqe& entry = cqes_[head & cq_mask_];
            if (Op* op = reinterpret_cast<Op*>(entry.user_data)) {
                landed_.emplace_back(op, entry.res);
                --in_flight_;
            } else {
                uint64_t wakes;
                while (::read(woken_.value, &wakes, sizeof wakes) < 0 && errno == EINTR) {
                }
                watch();
            }
        }
        __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
    }

    void signal() {
        const uint64_t one = 1;
        while (write(woken_.value, &one, sizeof one) < 0 && errno == EINTR) {
        }
    }

    const unsigned depth_;
    Descriptor ring_, woken_;
    Map rings_, entries_;
    bool disabled_ = false;
    unsigned *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
    unsigned sq_mask_ = 0, cq_mask_ = 0;
    io_uring_cqe* cqes_ = nullptr;
    unsigned in_flight_ = 0, unsubmitted_ = 0;
    std::vector<std::pair<Op*, int>> landed_;  // reads that are over, not yet handed to the source
    std::atomic<bool> asleep_{false}, stopping_{false};
    Thread thread_;
};

}  // namespace

std::unique_ptr<Backend> make_uring(unsigned depth, std::string& why_not) {
    auto ring = std::make_unique<Uring>(depth);
    if (ring->open()) return ring;
    why_not = std::strerror(errno);
    return nullptr;
}

}  // namespace flashrt::io

#else

namespace flashrt::io {

std::unique_ptr<Backend> make_uring(unsigned, std::string& why_not) {
    why_not = "built without it";
    return nullptr;
}

}  // namespace flashrt::io

#endif
