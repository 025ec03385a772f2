// What the page cache holds already, copied from there.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include <algorithm>

#include "backend.h"

namespace flashrt::io {
namespace {

// Bytes from `offset` on, whole pages, that are in the page cache without a gap. Asked by `mincore`, since a read that
// must not wait still has the kernel begin to read what is missing.
size_t held(int descriptor, uint64_t offset, size_t bytes) {
    unsigned char pages[1024];  // no allocation: each thread would get an arena
    bytes = std::min(bytes, sizeof pages * PAGE);
    void* map = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, descriptor, static_cast<off_t>(offset));
    if (map == MAP_FAILED) return 0;
    size_t count = 0;
    if (mincore(map, bytes, pages) == 0)
        while (count < bytes / PAGE && (pages[count] & 1)) ++count;
    munmap(map, bytes);
    return count * PAGE;
}

}  // namespace

int64_t copy_cached(Op* op) {
    op->from_cache = false;
#if defined(RWF_NOWAIT)
    if (op->file.cached < 0) return 0;
    const uint64_t offset = op->offset + op->done;
    const size_t there = held(op->file.cached, offset, op->bytes - op->done);
    if (there == 0) return 0;
    const iovec to = {op->to + op->done, there};
    const ssize_t bytes = preadv2(op->file.cached, &to, 1, static_cast<off_t>(offset), RWF_NOWAIT);
    if (bytes < static_cast<ssize_t>(PAGE)) return 0;  // gone again, or a file system that cannot tell
    op->from_cache = true;
    return bytes / PAGE * PAGE;
#else
    return 0;
#endif
}

}  // namespace flashrt::io
