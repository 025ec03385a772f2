#include "engine.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "crc32.h"

namespace flashrt::io {
namespace {

constexpr int MORE = -4;  // beside the statuses: a read must go on

bool aligned(uint64_t value) { return value % PAGE == 0; }

bool aligned(const Row& row) {
    return aligned(row.offset) && aligned(row.bytes) && aligned(reinterpret_cast<uintptr_t>(row.to));
}

bool follows(const Row& row, const Row& next) {
    return next.offset == row.offset + row.bytes && next.to == row.to + row.bytes;
}

void drop_pages(const Op& op) {
#if defined(POSIX_FADV_DONTNEED)
    posix_fadvise(op.file.descriptor, static_cast<off_t>(op.offset), static_cast<off_t>(op.bytes), POSIX_FADV_DONTNEED);
#else
    (void)op;
#endif
}

}  // namespace

void Engine::List::push_back(Op* op) {
    op->next = nullptr;
    (head ? tail->next : head) = op;
    tail = op;
}

void Engine::List::push_front(Op* op) {
    op->next = head;
    if (!head) tail = op;
    head = op;
}

Op* Engine::List::pop_front() {
    Op* op = head;
    head = op->next;
    return op;
}

Engine::Engine(std::unique_ptr<Backend> backend, size_t chunk, uint8_t* staging, size_t staging_bytes)
    : backend_(std::move(backend)), chunk_(chunk), staging_(staging, staging_bytes) {
    if (max_span_pages() < 1 || chunk_ < PAGE) throw std::invalid_argument("staging or pieces are too small");
    try {
        backend_->start(*this);
    } catch (...) {
        close();
        throw;
    }
}

Engine::~Engine() { close(); }

void Engine::set_costs(std::vector<double> costs) {
    costs.resize(std::min(costs.size(), max_span_pages()));
    auto merger = std::make_shared<Merger>();
    merger->set_costs(std::move(costs));
    std::lock_guard<std::mutex> lock(mutex_);
    merger_ = std::move(merger);
}

// A request to be filled in, which nobody else knows of until it is submitted. Null once closed.
Request* Engine::begin() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return nullptr;
    if (free_requests_.empty()) free_requests_.push_back(&requests_.emplace_back());
    Request* request = free_requests_.back();
    free_requests_.pop_back();
    request->merger = merger_;
    request->rows.clear();
    request->crc.reset();
    request->status = GOOD;
    request->bytes_read.store(0, std::memory_order_relaxed);
    request->over.store(false, std::memory_order_relaxed);
    ++unfinished_;
    return request;
}

Request* Engine::read(File file, uint64_t offset, uint8_t* to, size_t bytes, std::optional<uint32_t> crc) {
    Request* request = begin();
    if (!request) return nullptr;
    request->whole = {offset, bytes, to};
    request->crc = crc;
    add_row(request, request->whole);
    submit(request, file, blocks_);
    return request;
}

Request* Engine::read_rows(File file, const int64_t* offsets, const int64_t* slots, size_t count, size_t bytes,
                           uint8_t* out, int64_t stride) {
    Request* request = begin();
    if (!request) return nullptr;
    const auto row_at = [&](size_t i) { return Row{static_cast<uint64_t>(offsets[i]), bytes, out + slots[i] * stride}; };
    for (size_t i = 0; i < count; ++i) {
        Row row = row_at(i);
        // Whole pages that follow one another, in the file and in memory alike, are one row, which needs no staging.
        while (i + 1 < count && aligned(row) && follows(row, row_at(i + 1))) {
            row.bytes += bytes;
            ++i;
        }
        add_row(request, row);
    }
    const auto by_offset = [](const Row& a, const Row& b) { return a.offset < b.offset; };
    if (!std::is_sorted(request->rows.begin(), request->rows.end(), by_offset))
        std::sort(request->rows.begin(), request->rows.end(), by_offset);
    submit(request, file, rows_);
    return request;
}

// A row too long for staging is cut: what is aligned, in the file and in memory alike, goes straight to its place.
void Engine::add_row(Request* request, Row row) {
    const uint64_t limit = max_span_pages() * PAGE;
    const bool congruent = aligned(reinterpret_cast<uintptr_t>(row.to) - row.offset);
    while (row.bytes > 0) {
        const uint64_t into = row.offset % PAGE;
        uint64_t bytes = std::min(row.bytes, limit - into);
        if (congruent && bytes < row.bytes) bytes = into > 0 ? PAGE - into : row.bytes / PAGE * PAGE;
        request->rows.push_back({row.offset, bytes, row.to});
        row = {row.offset + bytes, row.bytes - bytes, row.to + bytes};
    }
}

void Engine::submit(Request* request, File file, List& list) {
    request->merger->cut(request->rows, request->runs, request->reads);
    std::unique_lock<std::mutex> lock(mutex_);
    for (const MergedRead& read : request->reads) {
        const Row& row = request->rows[read.first];
        if (read.last - read.first == 1 && aligned(row)) add_direct(request, file, row, list);
        else add_staged(request, file, read, list);
    }
    if (request->left == 0) finish(request, lock);
    else if (closed_) drop(request, lock);  // in the meantime
    lock.unlock();
    work_.notify_all();
    backend_->wake();
}

void Engine::add_direct(Request* request, File file, const Row& row, List& list) {
    for (uint64_t at = 0; at < row.bytes; at += chunk_) {
        const uint64_t bytes = std::min<uint64_t>(chunk_, row.bytes - at);
        add_op({request, nullptr, file, row.offset + at, bytes, bytes, 0, row.to + at, false, {}}, list);
    }
}

void Engine::add_staged(Request* request, File file, const MergedRead& read, List& list) {
    const uint64_t begin = request->rows[read.first].offset / PAGE * PAGE;
    uint64_t end = 0;
    for (size_t i = read.first; i < read.last; ++i)
        end = std::max(end, request->rows[i].offset + request->rows[i].bytes);
    const uint64_t bytes = (end - begin + PAGE - 1) / PAGE * PAGE;
    add_op({request, nullptr, file, begin, bytes, end - begin, 0, nullptr, false, read}, list);
}

void Engine::add_op(Op values, List& list) {
    if (free_ops_.empty()) {
        free_ops_.push_back(&ops_.emplace_back());
        free_ops_.reserve(ops_.size());  // here, so that threads that read never allocate: each would get an arena
    }
    Op* op = free_ops_.back();
    free_ops_.pop_back();
    *op = values;
    list.push_back(op);
    ++op->request->left;
}

Op* Engine::take(bool wait) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        Op* op = next(rows_);
        if (!op) op = next(blocks_);
        if (op) return op;
        if (!wait || closed_) return nullptr;
        work_.wait(lock);
    }
}

// The first of a list; null when there is none, or no room in staging for it yet.
Op* Engine::next(List& list) {
    Op* op = list.head;
    if (!op) return nullptr;
    if (!op->to && !(op->to = staging_.take(op->bytes))) return nullptr;
    return list.pop_front();
}

void Engine::complete(Op* op, int64_t result) {
    Request* request = op->request;
    const int status = judge(op, result);
    if (status == GOOD) {
        for (size_t i = op->rows.first; i < op->rows.last; ++i) {
            const Row& row = request->rows[i];
            std::memcpy(row.to, op->to + (row.offset - op->offset), row.bytes);
        }
        if (!op->file.direct && !op->from_cache) drop_pages(*op);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    if (status == MORE && request->status == GOOD && !closed_) {
        rows_.push_front(op);
        return;
    }
    if (status != GOOD && request->status == GOOD) {
        request->status = status == MORE ? CANCELLED : status;
        request->at = op->offset + (status == ENDED ? op->needed : op->done);
        drop(request, lock);
    }
    retire(op, lock);
}

// What a result means: GOOD when the read is over, MORE when it must go on, or else why it failed.
int Engine::judge(Op* op, int64_t result) {
    if (result == -EINTR || result == -EAGAIN) return MORE;
    if (result < 0) return static_cast<int>(-result);
    uint64_t done = op->done + static_cast<uint64_t>(result);
    if (done < op->needed && op->file.direct) done = done / PAGE * PAGE;  // from where it can go on
    const uint64_t from_disk = op->from_cache ? 0 : done - op->done;
    bytes_read_.fetch_add(from_disk, std::memory_order_relaxed);
    op->request->bytes_read.fetch_add(from_disk, std::memory_order_relaxed);
    if (done == op->done) return ENDED;
    op->done = done;
    return done < op->needed ? MORE : GOOD;
}

// Takes what has not been issued off the lists: of one request, or with null of all.
void Engine::drop(Request* request, std::unique_lock<std::mutex>& lock) {
    for (List* list : {&rows_, &blocks_}) {
        List kept;
        while (list->head) {
            Op* op = list->pop_front();
            if (request && op->request != request) {
                kept.push_back(op);
                continue;
            }
            if (op->request->status == GOOD) op->request->status = CANCELLED;
            retire(op, lock);
        }
        *list = kept;
    }
}

void Engine::retire(Op* op, std::unique_lock<std::mutex>& lock) {
    Request* request = op->request;
    if (op->staged() && op->to) {
        staging_.give_back(op->to);
        work_.notify_one();
    }
    free_ops_.push_back(op);
    if (--request->left == 0) finish(request, lock);
}

void Engine::finish(Request* request, std::unique_lock<std::mutex>& lock) {
    if (request->crc && request->status == GOOD) {
        lock.unlock();
        const bool same = crc32(request->whole.to, request->whole.bytes) == *request->crc;
        lock.lock();
        if (!same) request->status = DAMAGED;
    }
    request->over.store(true, std::memory_order_release);
    --unfinished_;
    over_.notify_all();
}

bool Engine::wait(Request* request, std::chrono::milliseconds longest) {
    const auto over = [request] { return request->over.load(std::memory_order_acquire); };
    if (over()) return true;
    std::unique_lock<std::mutex> lock(mutex_);
    return over_.wait_for(lock, longest, over);
}

void Engine::cancel(Request* request) {
    std::unique_lock<std::mutex> lock(mutex_);
    drop(request, lock);
}

void Engine::release(Request* request) {
    std::unique_lock<std::mutex> lock(mutex_);
    drop(request, lock);
    over_.wait(lock, [request] { return request->over.load(std::memory_order_relaxed); });
    free_requests_.push_back(request);
}

bool Engine::settle(std::chrono::milliseconds longest) {
    std::unique_lock<std::mutex> lock(mutex_);
    return over_.wait_for(lock, longest, [this] { return unfinished_ == 0; });
}

void Engine::close() {
    {
        std::unique_lock<std::mutex> lock(mutex_);
        closed_ = true;
        drop(nullptr, lock);
        over_.wait(lock, [this] { return unfinished_ == 0; });
    }
    work_.notify_all();
    std::call_once(stopped_, [this] { backend_->stop(); });
}

}  // namespace flashrt::io
