// Which neighbouring rows to read together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace flashrt::io {

constexpr uint64_t PAGE = 4096;  // O_DIRECT reads start and end on such a boundary, whatever the disk's sector

struct Row {
    uint64_t offset;  // in the file
    uint64_t bytes;
    uint8_t* to;
};

// Rows [first, last) that one read brings.
struct MergedRead {
    size_t first, last;
};

// Cuts rows into reads such that these, each from page boundary to page boundary, costs least.
class Merger {
   public:
    // Rows whose pages lie within those of the first, and the cheapest way to read all rows up to them.
    struct Run {
        size_t first;         // row
        uint64_t begin, end;  // pages
        double cost;
        size_t from;  // the run with which the last read begins
    };

    // costs[n - 1] is the time that a read of n pages takes of the disk, in any unit. No read has more than
    // costs.size() pages, unless it is a single row.
    void set_costs(std::vector<double> costs) { costs_ = std::move(costs); }

    // The cheapest cut of `rows`, ascending by offset, into `reads`; without costs, every row is a read of its own.
    // `runs` is memory to work in.
    void cut(const std::vector<Row>& rows, std::vector<Run>& runs, std::vector<MergedRead>& reads) const;

   private:
    double cost(uint64_t pages) const;
    void find_runs(const std::vector<Row>& rows, std::vector<Run>& runs) const;

    std::vector<double> costs_;
};

}  // namespace flashrt::io
