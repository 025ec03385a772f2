#include "merge.h"

#include <algorithm>
#include <limits>

namespace flashrt::io {

double Merger::cost(uint64_t pages) const {
    if (pages <= costs_.size()) return costs_[pages - 1];
    return costs_.back() * static_cast<double>(pages) / static_cast<double>(costs_.size());
}

// A row whose pages another one needs anyway costs nothing beside it, so they count as one, up to the largest read.
void Merger::find_runs(const std::vector<Row>& rows, std::vector<Run>& runs) const {
    runs.clear();
    for (size_t i = 0; i < rows.size(); ++i) {
        const uint64_t begin = rows[i].offset / PAGE;
        const uint64_t end = (rows[i].offset + rows[i].bytes + PAGE - 1) / PAGE;
        const bool within = !runs.empty() && end <= runs.back().end;
        if (!within || runs.back().end - runs.back().begin > costs_.size()) runs.push_back({i, begin, end, 0, 0});
    }
}

void Merger::cut(const std::vector<Row>& rows, std::vector<Run>& runs, std::vector<MergedRead>& reads) const {
    reads.clear();
    if (costs_.empty() || rows.size() < 2) {
        for (size_t i = 0; i < rows.size(); ++i) reads.push_back({i, i + 1});
        return;
    }
    find_runs(rows, runs);
    for (size_t j = 0; j < runs.size(); ++j) {
        runs[j].cost = std::numeric_limits<double>::infinity();
        for (size_t i = j + 1; i-- > 0;) {  // the last read holds runs i to j
            const uint64_t pages = runs[j].end - runs[i].begin;
            // Neither may a longer row before hide in a read that ends before it does.
            if (i < j && (pages > costs_.size() || runs[i].end > runs[j].end)) break;
            const double total = (i > 0 ? runs[i - 1].cost : 0) + cost(pages);
            if (total < runs[j].cost) {
                runs[j].cost = total;
                runs[j].from = i;
            }
        }
    }
    size_t last = rows.size();
    for (size_t j = runs.size(); j > 0; j = runs[j - 1].from) {
        const size_t first = runs[runs[j - 1].from].first;
        reads.push_back({first, last});
        last = first;
    }
    std::reverse(reads.begin(), reads.end());
}

}  // namespace flashrt::io
