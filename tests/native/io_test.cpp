// The I/O engine without Python: what it brings equals the file, whatever the backend does and however it is treated.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "crc32.h"
#include "engine.h"
#include "merge.h"
#include "thread.h"

using namespace flashrt::io;

namespace {

constexpr size_t CHUNK = 16 << 10;
constexpr size_t STAGING = 1 << 20;
constexpr size_t FILE_BYTES = (3 << 20) + 1234;  // ends within a page
constexpr unsigned DEPTH = 8;
const std::chrono::milliseconds FOREVER{1 << 30};

uint64_t address(const uint8_t* data) { return reinterpret_cast<uintptr_t>(data); }

struct Memory {
    explicit Memory(size_t size) : bytes(size), data(static_cast<uint8_t*>(std::aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE))) {}
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { std::free(data); }
    size_t bytes;
    uint8_t* data;
};

// A file of random bytes with no name, and what is in it.
struct TestFile {
    TestFile() : content(FILE_BYTES) {
        std::mt19937_64 random(1);
        for (uint8_t& byte : content) byte = static_cast<uint8_t>(random());
        char name[] = "io_test.XXXXXX";
        const int made = mkstemp(name);
        CHECK(made >= 0 && write(made, content.data(), FILE_BYTES) == static_cast<ssize_t>(FILE_BYTES));
        fsync(made);
        const int direct = open(name, O_RDONLY | O_DIRECT);
        file = {direct >= 0 ? direct : open(name, O_RDONLY), true};  // the engine keeps to whole pages either way
        buffered = {open(name, O_RDONLY), false};
        unlink(name);
        close(made);
    }
    ~TestFile() {
        close(file.descriptor);
        close(buffered.descriptor);
    }
    File file, buffered;
    std::vector<uint8_t> content;
};

// Threads whose reads end early, are interrupted, come back empty-handed or fail. Not every file system refuses direct
// reads of less than whole pages, so they are checked here.
class Flaky final : public Backend {
   public:
    explicit Flaky(int fail_after) : fail_after_(fail_after) {}
    const char* name() const override { return "flaky"; }
    void start(Source& source) override {
        for (Thread& thread : threads_) thread.start("flaky", [this, &source] { work(source); });
    }
    void wake() override {}
    void stop() override {
        for (Thread& thread : threads_) thread.join();
    }

   private:
    void work(Source& source) {
        std::mt19937 random(7);
        while (Op* op = source.take(true)) source.complete(op, result(op, random()));
    }
    int64_t result(Op* op, unsigned dice) {
        if (reads_.fetch_add(1) == fail_after_) return -EIO;
        if (dice % 5 == 0) return -EINTR;
        if (dice % 7 == 0) return -EAGAIN;
        if (op->file.direct)
            for (const uint64_t part : {op->offset + op->done, op->bytes - op->done, address(op->to + op->done)})
                CHECK(part % PAGE == 0);
        const ssize_t n = pread(op->file.descriptor, op->to + op->done, op->bytes - op->done, op->offset + op->done);
        if (n > static_cast<ssize_t>(PAGE) && dice % 3 == 0) return PAGE + dice % (n - PAGE);
        return n < 0 ? -errno : n;
    }
    const int fail_after_;
    std::atomic<int> reads_{0};
    Thread threads_[3];
};

using Maker = std::unique_ptr<Backend> (*)();

std::unique_ptr<Backend> uring() {
    std::string why_not;
    return make_uring(DEPTH, why_not);
}
std::unique_ptr<Backend> pool() { return make_pool(DEPTH); }
std::unique_ptr<Backend> flaky() { return std::make_unique<Flaky>(-1); }

std::vector<double> costs(double fixed) {
    std::vector<double> result;
    for (int pages = 1; pages <= 64; ++pages) result.push_back(fixed + pages);
    return result;
}

void same(const TestFile& file, const uint8_t* data, size_t offset, size_t bytes) {
    CHECK(std::memcmp(data, file.content.data() + offset, bytes) == 0);
}

void finish(Engine& engine, Request* request, int status) {
    CHECK(request && engine.wait(request, FOREVER));
    CHECK(request->status == status);
    engine.release(request);
}

void blocks(const TestFile& file, Maker maker) {
    Memory staging(STAGING), out(1 << 20);
    Engine engine(maker(), CHUNK, staging.data, STAGING);
    for (const size_t bytes : {PAGE, 5 * PAGE, CHUNK, CHUNK + PAGE, size_t{1} << 20}) {
        const uint32_t crc = crc32(file.content.data() + PAGE, bytes);
        finish(engine, engine.read(file.file, PAGE, out.data, bytes, crc), GOOD);
        same(file, out.data, PAGE, bytes);
        finish(engine, engine.read(file.file, PAGE, out.data, bytes, crc ^ 1), DAMAGED);
    }
    // Heads and tails that are not aligned; memory that is not either.
    for (const size_t offset : {size_t{1}, PAGE - 1, PAGE + 17})
        for (const size_t bytes : {size_t{1}, PAGE, size_t{500000}})
            for (uint8_t* to : {out.data, out.data + 3, out.data + offset % PAGE}) {
                finish(engine, engine.read(file.file, offset, to, bytes, std::nullopt), GOOD);
                same(file, to, offset, bytes);
            }
    finish(engine, engine.read(file.buffered, 77, out.data, 99999, std::nullopt), GOOD);
    same(file, out.data, 77, 99999);
    finish(engine, engine.read(file.file, FILE_BYTES - 5, out.data, 5, std::nullopt), GOOD);
    finish(engine, engine.read(file.file, FILE_BYTES - 5, out.data, 6, std::nullopt), ENDED);
    finish(engine, engine.read(file.file, 1 << 30, out.data, PAGE, std::nullopt), ENDED);
    finish(engine, engine.read({-1, true}, 0, out.data, PAGE, std::nullopt), EBADF);
    CHECK(engine.bytes_read() > 0);
}

void scattered(const TestFile& file, Maker maker) {
    Memory staging(STAGING);
    Engine engine(maker(), CHUNK, staging.data, STAGING);
    std::mt19937 random(3);
    for (int round = 0; round < 40; ++round) {
        if (round % 4 == 0) engine.set_costs(costs(round));
        const size_t count = random() % 300, bytes = 1 + random() % 9000;
        Memory out((count + 1) * (bytes + 5));
        std::vector<int64_t> offsets(count), slots(count);
        for (size_t i = 0; i < count; ++i) {
            offsets[i] = static_cast<int64_t>(random() % (FILE_BYTES - bytes));
            slots[i] = static_cast<int64_t>(count - 1 - i);
        }
        finish(engine, engine.read_rows(file.file, offsets.data(), slots.data(), count, bytes, out.data,
                                        static_cast<int64_t>(bytes + 5)), GOOD);
        for (size_t i = 0; i < count; ++i)
            same(file, out.data + slots[i] * (bytes + 5), static_cast<size_t>(offsets[i]), bytes);
    }
}

// Threads that read, cancel and let go at random, while the engine may be closed under them.
void storm(const TestFile& file, Maker maker, bool close_early) {
    Memory staging(STAGING);
    Engine engine(maker(), CHUNK, staging.data, STAGING);
    engine.set_costs(costs(8));
    const auto work = [&](unsigned seed) {
        std::mt19937 random(seed);
        Memory out(1 << 18);
        for (int i = 0; i < 150; ++i) {
            const size_t offset = random() % (FILE_BYTES - (1 << 18)) / PAGE * PAGE;
            Request* request = nullptr;
            if (random() % 2) {
                request = engine.read(file.file, offset, out.data, 1 << 18, std::nullopt);
            } else {
                std::vector<int64_t> offsets(64), slots(64);
                for (int64_t k = 0; k < 64; ++k) offsets[k] = static_cast<int64_t>(offset) + k * 1500, slots[k] = k;
                request = engine.read_rows(file.file, offsets.data(), slots.data(), 64, 1000, out.data, 1000);
            }
            if (!request) return;
            if (random() % 3 == 0) engine.cancel(request);
            if (random() % 3 == 0) {
                CHECK(engine.wait(request, FOREVER));
                CHECK(request->status == GOOD || request->status == CANCELLED);
                if (request->status == GOOD) same(file, out.data, offset, 1000);
            }
            engine.release(request);
            std::memset(out.data, 0, out.bytes);  // nobody else writes here any more
        }
    };
    std::vector<std::thread> threads;
    for (unsigned seed = 0; seed < 4; ++seed) threads.emplace_back(work, seed);
    if (close_early) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        engine.close();
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(engine.settle(FOREVER));
}

void error_is_reported_where_it_struck(const TestFile& file) {
    Memory staging(STAGING), out(1 << 20);
    Engine engine(std::make_unique<Flaky>(20), CHUNK, staging.data, STAGING);
    Request* request = engine.read(file.file, 0, out.data, 1 << 20, std::nullopt);
    CHECK(engine.wait(request, FOREVER));
    CHECK(request->status == EIO && request->at < (1 << 20));
    engine.release(request);
    finish(engine, engine.read(file.file, 0, out.data, 1 << 20, std::nullopt), GOOD);
}

void staging_hands_out_no_byte_twice() {
    Memory memory(64 * PAGE);
    Staging staging(memory.data, memory.bytes);
    std::mt19937 random(5);
    std::vector<std::pair<uint8_t*, size_t>> out;
    for (int i = 0; i < 20000; ++i) {
        const size_t bytes = (1 + random() % 20) * PAGE;
        if (uint8_t* piece = random() % 2 ? staging.take(bytes) : nullptr) {
            CHECK(piece >= memory.data && piece + bytes <= memory.data + memory.bytes);
            for (const auto& [other, size] : out) CHECK(piece + bytes <= other || other + size <= piece);
            out.emplace_back(piece, bytes);
        } else if (!out.empty()) {
            std::swap(out[random() % out.size()], out.back());
            staging.give_back(out.back().first);
            out.pop_back();
        }
        if (out.empty()) {
            uint8_t* all = staging.take(memory.bytes);
            CHECK(all);
            staging.give_back(all);
        }
    }
}

// Rows of any length, long ones among short ones: reads cover them in order, and only a single row may be too long.
void merged_reads_are_bounded() {
    constexpr size_t MOST = 16;
    std::vector<double> costs;
    for (size_t pages = 1; pages <= MOST; ++pages) costs.push_back(8.0 + static_cast<double>(pages));
    Merger merger;
    merger.set_costs(costs);
    std::mt19937 random(11);
    std::vector<Merger::Run> runs;
    std::vector<MergedRead> reads;
    for (int round = 0; round < 3000; ++round) {
        std::vector<Row> rows(1 + random() % 12);
        for (Row& row : rows) row = {random() % (40 * PAGE), 1 + random() % (random() % 3 ? PAGE : 40 * PAGE), nullptr};
        std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.offset < b.offset; });
        merger.cut(rows, runs, reads);
        size_t next = 0;
        for (const MergedRead& read : reads) {
            CHECK(read.first == next && read.last > read.first);
            next = read.last;
            if (read.last - read.first == 1) continue;
            uint64_t end = 0;
            for (size_t i = read.first; i < read.last; ++i)
                end = std::max(end, (rows[i].offset + rows[i].bytes + PAGE - 1) / PAGE);
            CHECK(end - rows[read.first].offset / PAGE <= MOST);
        }
        CHECK(next == rows.size());
    }
}

void checksums() {
    std::mt19937 random(9);
    std::vector<uint8_t> data(70000);
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
    CHECK(crc32(reinterpret_cast<const uint8_t*>("123456789"), 9) == 0xCBF43926);
    for (size_t start = 0; start < 20; ++start)
        for (size_t bytes = 0; bytes < 300; ++bytes)
            CHECK(crc32(data.data() + start, bytes) == crc32_portable(data.data() + start, bytes));
    CHECK(crc32(data.data(), data.size()) == crc32_portable(data.data(), data.size()));
}

}  // namespace

int main() {
    const TestFile file;
    checksums();
    staging_hands_out_no_byte_twice();
    merged_reads_are_bounded();
    error_is_reported_where_it_struck(file);
    for (const Maker maker : {uring, pool, flaky}) {
        if (!maker()) {
            std::puts("no io_uring here");
            continue;
        }
        blocks(file, maker);
        scattered(file, maker);
        storm(file, maker, false);
        storm(file, maker, true);
        std::printf("%s: good\n", maker()->name());
    }
}
