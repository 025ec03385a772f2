// Memory through which reads pass whose place in the file or in memory is not aligned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace flashrt::io {

// A ring: pieces are handed out in order and may come back in any; the oldest that is still out bounds it.
class Staging {
   public:
    Staging(uint8_t* memory, size_t bytes) : memory_(memory), bytes_(bytes) { pieces_.reserve(bytes / PIECE); }

    size_t bytes() const { return bytes_; }

    // `bytes` bytes, or null when so many are not free in one piece. Never null while nothing is out.
    uint8_t* take(size_t bytes);
    void give_back(uint8_t* piece);

   private:
    struct Piece {
        size_t start, end;
        bool out;
    };

    uint8_t* memory_;
    size_t bytes_;
    static constexpr size_t PIECE = 4096;  // bytes at least

    std::vector<Piece> pieces_;  // oldest first
};

}  // namespace flashrt::io
