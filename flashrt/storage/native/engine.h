// Many reads in flight, into memory of the caller, completed by handle.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "backend.h"
#include "merge.h"
#include "staging.h"

namespace flashrt::io {

enum Status : int {
    GOOD = 0,  // a positive status is an errno
    ENDED = -1,  // the file ends before the last byte that was asked for
    DAMAGED = -2,  // the checksum does not match
    CANCELLED = -3,
};

// What a caller asked for with one call and waits for with one handle. Only the engine touches it.
struct Request {
    std::shared_ptr<const Merger> merger;
    std::vector<Row> rows;
    std::vector<Merger::Run> runs;  // of a plan; kept, like all memory here, for the next one who asks
    std::vector<MergedRead> reads;
    std::optional<uint32_t> crc;  // of the bytes of `whole`
    Row whole{};
    size_t left = 0;  // reads that are not over
    int status = GOOD;
    uint64_t at = 0;  // in the file: where it went wrong
    std::atomic<uint64_t> bytes_read{0};
    std::atomic<bool> over{true};
};

// All functions may be called from any thread. Requests of scattered rows overtake whole blocks: rows are waited for,
// blocks are read ahead.
class Engine final : private Source {
   public:
    static constexpr size_t MERGED_READS = 16;  // of the largest, that staging has room for at least

    // Reads are issued in pieces of `chunk` bytes, a multiple of PAGE. `staging` is page-aligned, has MERGED_READS pages
    // at least, and outlives the engine. Throws std::system_error when the system refuses a thread.
    Engine(std::unique_ptr<Backend> backend, size_t chunk, uint8_t* staging, size_t staging_bytes);
    ~Engine() override;

    const char* backend() const { return backend_->name(); }
    uint64_t bytes_read() const { return bytes_read_.load(std::memory_order_relaxed); }  // from disk

    // costs[n - 1]: what a read of n pages costs, for the merging of rows. See Merger.
    void set_costs(std::vector<double> costs);
    size_t max_span_pages() const { return staging_.bytes() / PAGE / MERGED_READS; }

    // Starts to read into `to`; with `crc`, the bytes are compared with it. Null once closed. Every request must go back
    // through `release`, and its memory must stay until then.
    Request* read(File file, uint64_t offset, uint8_t* to, size_t bytes, std::optional<uint32_t> crc);

    // Starts to read `count` rows of `bytes` bytes each: the one at offsets[i] to out + slots[i] * stride.
    Request* read_rows(File file, const int64_t* offsets, const int64_t* slots, size_t count, size_t bytes, uint8_t* out,
                       int64_t stride);

    // Whether the request is over, after waiting for it so long.
    bool wait(Request* request, std::chrono::milliseconds longest);

    // Drops what has not been issued yet. The request is over as soon as what has been is.
    void cancel(Request* request);

    // Takes a request back, over or not: cancels it and waits for what is under way.
    void release(Request* request);

    // Whether all requests are over, after waiting for them so long.
    bool settle(std::chrono::milliseconds longest);

    // Finishes what is under way, cancels all else. Afterwards no memory is written any more.
    void close();

   private:
    struct List {
        Op* head = nullptr;
        Op* tail = nullptr;
        void push_back(Op* op);
        void push_front(Op* op);
        Op* pop_front();
    };

    Op* take(bool wait) override;
    void complete(Op* op, int64_t result) override;

    Request* begin();
    void add_row(Request* request, Row row);
    void submit(Request* request, File file, List& list);
    void add_direct(Request* request, File file, const Row& row, List& list);
    void add_staged(Request* request, File file, const MergedRead& read, List& list);
    void add_op(Op op, List& list);
    Op* next(List& list);
    void drop(Request* request, std::unique_lock<std::mutex>& lock);
    void retire(Op* op, std::unique_lock<std::mutex>& lock);
    void finish(Request* request, std::unique_lock<std::mutex>& lock);
    int judge(Op* op, int64_t result);

    std::unique_ptr<Backend> backend_;
    const size_t chunk_;
    std::atomic<uint64_t> bytes_read_{0};

    std::mutex mutex_;  // guards all that follows, and requests but for their rows
    std::condition_variable work_, over_;
    List rows_, blocks_;
    std::shared_ptr<const Merger> merger_ = std::make_shared<Merger>();
    Staging staging_;
    std::deque<Op> ops_;
    std::deque<Request> requests_;
    std::vector<Op*> free_ops_;
    std::vector<Request*> free_requests_;
    size_t unfinished_ = 0;  // requests
    bool closed_ = false;
    std::once_flag stopped_;
};

}  // namespace flashrt::io
