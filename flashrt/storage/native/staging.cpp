#include "staging.h"

#include <algorithm>

namespace flashrt::io {

uint8_t* Staging::take(size_t bytes) {
    size_t start = 0;
    if (pieces_.empty()) {
        if (bytes > bytes_) return nullptr;
    } else {
        const size_t head = pieces_.back().end, tail = pieces_.front().start;
        if (head > tail) {  // free: from head to the end, and from the beginning to tail
            if (bytes <= bytes_ - head) start = head;
            else if (bytes > tail) return nullptr;
        } else {
            if (bytes > tail - head) return nullptr;
            start = head;
        }
    }
    pieces_.push_back({start, start + bytes, true});
    return memory_ + start;
}

void Staging::give_back(uint8_t* piece) {
    const size_t start = static_cast<size_t>(piece - memory_);
    const auto is = [start](const Piece& p) { return p.start == start && p.out; };
    std::find_if(pieces_.begin(), pieces_.end(), is)->out = false;
    const auto out = [](const Piece& p) { return p.out; };
    pieces_.erase(pieces_.begin(), std::find_if(pieces_.begin(), pieces_.end(), out));
}

}  // namespace flashrt::io
