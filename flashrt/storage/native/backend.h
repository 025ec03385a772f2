// What carries out the reads of an engine: io_uring, or threads that call pread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "merge.h"

namespace flashrt::io {

struct Request;

// An open file. Where `direct` is false it was opened without O_DIRECT, and pages that were read are dropped. `cached` is
// open without it too, or -1: what the page cache holds is copied from there, and nothing is read into it.
struct File {
    int descriptor;
    bool direct;
    int cached = -1;
};

// One read as the system sees it. It lies on a list of the engine, or is with the backend.
struct Op {
    Request* request;
    Op* next;
    File file;
    uint64_t offset;  // in the file
    uint64_t bytes;   // that may be read
    uint64_t needed;  // that must be read: the end of the file may cut the rest
    uint64_t done;    // that were read so far
    uint8_t* to;
    bool from_cache;  // whether the last piece was
    MergedRead rows;  // of the request, that are copied to their places from `to`, which is staging memory; or none

    bool staged() const { return rows.first < rows.last; }
};

// Where a backend takes its work from and brings its results to: the engine. Any thread may call.
class Source {
   public:
    virtual ~Source() = default;

    // The next read, or null when there is none to be started now. With `wait`, null means that it is time to end.
    virtual Op* take(bool wait) = 0;

    // `result` is the number of bytes read, or a negative errno.
    virtual void complete(Op* op, int64_t result) = 0;
};

class Backend {
   public:
    virtual ~Backend() = default;
    virtual const char* name() const = 0;

    // Begin to take reads from `source`, at most as many at a time as the backend was made for.
    virtual void start(Source& source) = 0;

    // There may be something to take.
    virtual void wake() = 0;

    // End the threads. Nothing is under way any more, and nothing can be taken.
    virtual void stop() = 0;
};

constexpr size_t STACK_BYTES = 128 << 10;  // of a thread that reads: address space, of which a few pages are touched

// Copies what the page cache holds of the rest of a read, up to the first page that it lacks: the bytes, whole pages, or
// 0 where the disk has to be asked.
int64_t copy_cached(Op* op);

// A ring for `depth` reads in flight. Null, with the reason in `why_not`, where the kernel has or allows none.
std::unique_ptr<Backend> make_uring(unsigned depth, std::string& why_not);

// `depth` threads with one read each.
std::unique_ptr<Backend> make_pool(unsigned depth);

}  // namespace flashrt::io
