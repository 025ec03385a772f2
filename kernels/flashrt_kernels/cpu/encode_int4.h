// int4 searches for the scale and offset of each group that minimise the (weighted) squared error. A lane works on a
// group by itself, so that a group's codes depend neither on its lane nor on the groups beside it.
#pragma once

#include "groups.h"

namespace flashrt::FLASHRT_ISA {

struct Fit {  // w ≈ scale * q - offset
    L scale, offset, error;
};

FLASHRT_INLINE L quantized(L w, L inverse, L offset) {
    return min(all(15.0f), max(nothing(), round(mul(add(w, offset), inverse))));
}

// 1 / x, zero where x is not positive.
FLASHRT_INLINE L inverse_of(L x) { return select(below(nothing(), x), div(all(1.0f), x), nothing()); }

struct Moments {  // sums of q, q² and w q
    L q, qq, wq;
};

template <bool weighted>
__attribute__((noinline)) Moments moments(const Groups<weighted>& g, L inverse, L offset) {
    if constexpr (weighted) {
        L q[INT4_GROUP];
        for (int i = 0; i < INT4_GROUP; ++i) q[i] = quantized(g.weight(i), inverse, offset);
        const auto counted = [&](int i) FLASHRT_LAMBDA { return g.counted(q[i], i); };
        return {
            tree([&](int i) FLASHRT_LAMBDA { return add(counted(i), counted(i + 16)); }),
            tree([&](int i) FLASHRT_LAMBDA { return fma(counted(i + 16), q[i + 16], mul(counted(i), q[i])); }),
            tree([&](int i) FLASHRT_LAMBDA { return fma(counted(i + 16), g.weight(i + 16), mul(counted(i), g.weight(i))); }),
        };
    }
    L q_sum = nothing(), qq_sum = nothing();  // of small integers: exact in any order
    const L wq_sum = tree([&](int i) FLASHRT_LAMBDA {
        const L low = quantized(g.weight(i), inverse, offset), high = quantized(g.weight(i + 16), inverse, offset);
        q_sum = add(q_sum, add(low, high));
        qq_sum = fma(high, high, fma(low, low, qq_sum));
        return fma(high, g.weight(i + 16), mul(low, g.weight(i)));
    });
    return {q_sum, qq_sum, wq_sum};
}

// Rounds to codes at (inverse, offset), then solves for the best scale and offset of those codes; offset >= 0.
template <bool weighted>
FLASHRT_INLINE Fit refit(const Groups<weighted>& g, const Sums& sums, L inverse, L offset) {
    const L count = read_lanes(sums.count), sum_w = read_lanes(sums.sum_w);
    const Moments m = moments(g, inverse, offset);
    const L determinant = sub(mul(count, m.qq), mul(m.q, m.q));
    const M solvable = below(mul(mul(all(1e-6f), count), m.qq), determinant);  // not when all codes are equal
    L scale = select(solvable, div(sub(mul(count, m.wq), mul(sum_w, m.q)), determinant), nothing());
    L low = select(solvable, div(sub(mul(m.qq, sum_w), mul(m.q, m.wq)), determinant), nothing());
    if (const M level = without(below(sum_w, nothing()), solvable); any(level)) low = select(level, div(sum_w, count), low);
    if (const M zero = either(below(nothing(), low), without(equal(low, nothing()), solvable)); any(zero)) {
        low = select(zero, nothing(), low);
        scale = select(zero, select(below(nothing(), m.qq), div(m.wq, m.qq), nothing()), scale);
    }
    scale = select(below(nothing(), scale), scale, nothing());
    L error = sub(read_lanes(sums.sum_ww), mul(all(2.0f), add(mul(scale, m.wq), mul(low, sum_w))));
    error = add(error, mul(mul(scale, scale), m.qq));
    error = add(error, mul(mul(mul(all(2.0f), scale), low), m.q));
    error = add(error, mul(mul(low, low), count));
    return {scale, negated(low), error};
}

// Groups that are to be searched, `source(i)` giving group i; results go to scales[i] and offsets[i].
template <typename Source>
struct Queue {
    const Source& source;
    const int groups;
    float *scales, *offsets;
    int next = 0;
};

// Tries 16 grids on a group, from slightly too wide a grid to one that clips the ends, as outliers matter less than
// everything between; refits each up to three times, and keeps the best. A lane that is through takes the next group.
template <bool weighted, typename Source>
class Search {
   public:
    explicit Search(Queue<Source>& queue) : queue_(queue) {
        for (int lane = 0; lane < LANES; ++lane) next_group(lane);
    }

    bool busy() const { return busy_ > 0; }
    FLASHRT_INLINE void step() { step(read_lanes(scale_), read_lanes(offset_), read_lanes(tries_)); }

   private:
    static constexpr float GRIDS = 16.0f, TRIES = 3.0f;

    // The next fit of each lane: at its next grid, or from the fit before.
    FLASHRT_INLINE void step(L scale, L offset, L tries) {
        const L quarter = mul(all(0.25f), read_lanes(grid_)), top = read_lanes(top_);
        const M fresh = equal(tries, nothing());
        const L levels = select(fresh, add(all(14.4f), quarter), all(1.0f));
        const L inverse = div(levels, select(fresh, read_lanes(range_), scale));
        const L shifted = sub(top, div(mul(all(0.5f), sub(quarter, all(0.6f))), inverse));
        const L start = select(fresh, select(below(nothing(), shifted), shifted, nothing()), offset);
        const Fit fit = refit(lanes_, sums_, inverse, start);
        keep_better(fit);
        const L done = add(tries, all(1.0f));
        const M more = both(below(nothing(), fit.scale), below(done, all(TRIES)));
        const M again = without(more, seen(fit, done));
        const L grid = add(read_lanes(grid_), select(again, nothing(), all(1.0f)));
        remember(fit, done);
        store(scale_, fit.scale);
        store(offset_, fit.offset);
        store(tries_, select(again, done, nothing()));
        store(grid_, grid);
        if (any(equal(grid, all(GRIDS)))) turn_over(grid);
    }

    FLASHRT_INLINE void keep_better(const Fit& fit) {
        const L error = read_lanes(best_error_);
        const M better = below(fit.error, error);
        store(best_scale_, select(better, fit.scale, read_lanes(best_scale_)));
        store(best_offset_, select(better, fit.offset, read_lanes(best_offset_)));
        store(best_error_, select(better, fit.error, error));
    }

    // Whether one of the last fits was the same, and has been refitted as often as this one would be.
    FLASHRT_INLINE M seen(const Fit& fit, L done) const {
        M found = below(nothing(), nothing());
        for (const Seen& s : seen_) {
            const M same = both(equal(fit.scale, read_lanes(s.scale)), equal(fit.offset, read_lanes(s.offset)));
            found = either(found, without(same, below(done, read_lanes(s.done))));
        }
        return found;
    }

    FLASHRT_INLINE void remember(const Fit& fit, L done) {
        Seen& s = seen_[turn_++ % RECENT];
        store(s.scale, fit.scale);
        store(s.offset, fit.offset);
        store(s.done, done);
    }

    void turn_over(L grid) {
        float grids[LANES];
        store(grids, grid);
        for (int lane = 0; lane < LANES; ++lane)
            if (grids[lane] == GRIDS) {
                queue_.scales[index_[lane]] = best_scale_[lane];
                queue_.offsets[index_[lane]] = best_offset_[lane];
                --busy_;
                next_group(lane);
            }
    }

    // Weights that are all equal need no search. A lane for which nothing is left goes on with what it has, unseen.
    void next_group(int lane) {
        grid_[lane] = tries_[lane] = scale_[lane] = offset_[lane] = 0.0f;
        best_error_[lane] = __builtin_inff();
        for (Seen& s : seen_) s.scale[lane] = __builtin_nanf("");
        for (; queue_.next < queue_.groups; ++queue_.next) {
            const GroupAt at = queue_.source(queue_.next);
            const Summary summary(at);
            best_scale_[lane] = summary.range / 15.0f;
            best_offset_[lane] = summary.top;
            if (summary.range > 0.0f) {
                lanes_.put(lane, at);
                sums_.put(lane, summary);
                top_[lane] = summary.top;
                range_[lane] = summary.range;
                index_[lane] = queue_.next++;
                ++busy_;
                return;
            }
            queue_.scales[queue_.next] = 0.0f;
            queue_.offsets[queue_.next] = summary.top;
        }
        grid_[lane] = -__builtin_inff();
    }

    struct Seen {
        float scale[LANES], offset[LANES], done[LANES];
    };
    static constexpr int RECENT = 2;  // more find hardly more

    Queue<Source>& queue_;
    int busy_ = 0, turn_ = 0, index_[LANES] = {};
    Groups<weighted> lanes_ = {};
    Sums sums_ = {};
    Seen seen_[RECENT] = {};
    // Of each lane: what to fit next (`tries_` counts the fits of a grid so far), the group's range, the best so far.
    alignas(64) float grid_[LANES], tries_[LANES], scale_[LANES], offset_[LANES], top_[LANES] = {}, range_[LANES] = {};
    alignas(64) float best_scale_[LANES] = {}, best_offset_[LANES] = {}, best_error_[LANES];
};

template <bool weighted>
__attribute__((noinline)) L error_of(const Groups<weighted>& g, L scale, L offset) {
    const L inverse = inverse_of(scale), minus_offset = negated(offset);
    const auto error = [&](int i) FLASHRT_LAMBDA {
        return sub(fma(scale, quantized(g.weight(i), inverse, offset), minus_offset), g.weight(i));
    };
    return tree([&](int i) FLASHRT_LAMBDA {
        const L low = error(i), high = error(i + 16);
        const L sum = g.counted(mul(low, low), i);
        if constexpr (weighted) return fma(mul(high, high), g.share(i + 16), sum);
        else return add(mul(high, high), sum);
    });
}

struct Codes {
    L a, b, error;
};

// The code for a multiple of `step`, rounded half up, 0 to 255.
FLASHRT_INLINE L nearest_code(L x, L step) {
    return select(below(nothing(), step), min(all(255.0f), trunc(add(div(x, step), all(0.5f)))), nothing());
}

FLASHRT_INLINE M is_code(L x) { return both(below(all(-1.0f), x), below(x, all(256.0f))); }

// The best of `best` and the pairs of codes next to (a, b).
template <bool weighted>
FLASHRT_INLINE Codes choose(const Groups<weighted>& g, L u, L v, L a, L b, Codes best) {
    for (int i = 0; i < 9; ++i) {
        const L near_a = add(a, all(static_cast<float>(i / 3 - 1))), near_b = add(b, all(static_cast<float>(i % 3 - 1)));
        const L error = error_of(g, mul(u, near_a), mul(v, near_b));
        const M better = both(below(error, best.error), both(is_code(near_a), is_code(near_b)));
        best = {select(better, near_a, best.a), select(better, near_b, best.b), select(better, error, best.error)};
    }
    return best;
}

// Rows of one call, their groups numbered through.
template <bool weighted>
class Int4Rows {
   public:
    static constexpr int MOST = LONGEST_ROW / INT4_GROUP;  // groups of one call

    Int4Rows(const float* w, int k, const float* importance, uint8_t* out, size_t stride)
        : w_(w), importance_(importance), out_(out), stride_(stride), k_(k), groups_(padded(k) / INT4_GROUP),
          used_((k + INT4_GROUP - 1) / INT4_GROUP) {}

    static int most_rows(int k) { return MOST / ((k + INT4_GROUP - 1) / INT4_GROUP); }

    void encode(int rows) {
        const int groups = rows * used_;
        const auto source = [this](int i) { return group(i); };
        Queue<decltype(source)> queue{source, groups, scales_, offsets_};
        Search<weighted, decltype(source)> one(queue), two(queue);  // so that the core has something to do meanwhile
        while (one.busy() || two.busy()) {
            one.step();
            two.step();
        }
        for (int row = 0; row < rows; ++row) begin(row);
        int moved = 0;
        for (int first = 0; first < groups; first += LANES) moved = choose_first(first, groups, moved);
        for (int first = 0; first < moved; first += LANES) choose_again(first, moved);
    }

   private:
    FLASHRT_INLINE GroupAt group(int i) const {
        const int64_t row = i / used_;
        const int start = i % used_ * INT4_GROUP;
        return {w_ + row * k_ + start, importance_ ? importance_ + start : nullptr, k_ - start};
    }

    uint8_t* row_of(int i) const { return out_ + i / used_ * stride_; }

    // Zeros, and the units that scales and offsets are multiples of.
    void begin(int row) const {
        float most[2] = {0.0f, 0.0f};
        for (int i = row * used_; i < (row + 1) * used_; ++i) {
            most[0] = scales_[i] > most[0] ? scales_[i] : most[0];
            most[1] = offsets_[i] > most[1] ? offsets_[i] : most[1];
        }
        uint8_t* to = out_ + row * stride_;
        const size_t bytes = row_bytes(Codec::INT4, k_);
        std::memset(to, 0, bytes);
        for (int j = 0; j < 2; ++j) {
            const float unit = most[j] / 255.0f;
            std::memcpy(to + bytes - 8 + 4 * j, &unit, 4);
        }
    }

    // Codes next to what the search found, and what a fit to these gives; the number of groups that this moved, with
    // those before.
    FLASHRT_INLINE int choose_first(int first, int groups, int moved) {
        const int count = groups - first < LANES ? groups - first : LANES;
        for (int i = 0; i < LANES; ++i) index_[i] = first + (i < count ? i : count - 1);
        gather();
        Sums sums;
        sums.put_all(lanes_);
        const L u = read_lanes(u_), v = read_lanes(v_);
        const L a = nearest_code(from(scales_), u), b = nearest_code(from(offsets_), v);
        const Codes codes = choose(lanes_, u, v, a, b, {nothing(), nothing(), all(__builtin_inff())});
        write(codes, count);
        const L scale = mul(u, codes.a);
        const Fit fit = refit(lanes_, sums, div(all(1.0f), scale), mul(v, codes.b));
        const L next_a = nearest_code(fit.scale, u), next_b = nearest_code(fit.offset, v);
        float again[LANES], lanes[5][LANES];
        store(again, select(without(below(nothing(), scale), both(equal(a, next_a), equal(b, next_b))), all(1.0f), nothing()));
        store(lanes[0], next_a);
        store(lanes[1], next_b);
        store(lanes[2], codes.a);
        store(lanes[3], codes.b);
        store(lanes[4], codes.error);
        for (int i = 0; i < count; ++i)
            if (again[i] > 0.0f)
                moved_[moved++] = {first + i, lanes[0][i], lanes[1][i], lanes[2][i], lanes[3][i], lanes[4][i]};
        return moved;
    }

    FLASHRT_INLINE void choose_again(int first, int moved) {
        const int count = moved - first < LANES ? moved - first : LANES;
        float lanes[5][LANES];
        for (int i = 0; i < LANES; ++i) {
            const Moved& m = moved_[first + (i < count ? i : count - 1)];
            index_[i] = m.group;
            lanes[0][i] = m.next_a;
            lanes[1][i] = m.next_b;
            lanes[2][i] = m.a;
            lanes[3][i] = m.b;
            lanes[4][i] = m.error;
        }
        gather();
        write(choose(lanes_, read_lanes(u_), read_lanes(v_), read_lanes(lanes[0]), read_lanes(lanes[1]),
                     {read_lanes(lanes[2]), read_lanes(lanes[3]), read_lanes(lanes[4])}),
              count);
    }

    // Takes the groups of `index_` into lanes.
    FLASHRT_INLINE void gather() {
        for (int i = 0; i < LANES; ++i) {
            lanes_.put(i, group(index_[i]));
            const uint8_t* units = row_of(index_[i]) + row_bytes(Codec::INT4, k_) - 8;
            std::memcpy(u_ + i, units, 4);
            std::memcpy(v_ + i, units + 4, 4);
        }
    }

    FLASHRT_INLINE L from(const float* values) const {
        float lanes[LANES];
        for (int i = 0; i < LANES; ++i) lanes[i] = values[index_[i]];
        return read_lanes(lanes);
    }

    FLASHRT_INLINE void write(const Codes& codes, int count) {
        const L inverse = inverse_of(mul(read_lanes(u_), codes.a)), offset = mul(read_lanes(v_), codes.b);
        float a[LANES], b[LANES], pairs[INT4_GROUP / 2][LANES];  // weight 8 above 7 and so on: see rows.py
        store(a, codes.a);
        store(b, codes.b);
        for (int i = 0; i < INT4_GROUP / 2; ++i) {
            const int at = i / 8 * 16 + i % 8;
            const L low = quantized(lanes_.weight(at), inverse, offset);
            store(pairs[i], fma(quantized(lanes_.weight(at + 8), inverse, offset), all(16.0f), low));
        }
        for (int lane = 0; lane < count; ++lane) {
            const int at = index_[lane] % used_, n = span_groups(groups_, at);
            uint8_t* row = row_of(index_[lane]);
            row[padded(k_) / 2 + at] = static_cast<uint8_t>(a[lane]);
            row[padded(k_) / 2 + groups_ + at] = static_cast<uint8_t>(b[lane]);
            row += 16 * (at / INT4_SPAN * INT4_SPAN) + 8 * (at % INT4_SPAN);
            for (int i = 0; i < INT4_GROUP / 2; ++i)
                row[8 * n * (i / 8) + i % 8] = static_cast<uint8_t>(static_cast<int>(pairs[i][lane]));
        }
    }

    struct Moved {
        int group;
        float next_a, next_b, a, b, error;  // codes to try around, the best so far
    };

    const float* w_;
    const float* importance_;
    uint8_t* out_;
    const size_t stride_;
    const int k_, groups_, used_;  // `used_` groups of a row hold weights
    float scales_[MOST], offsets_[MOST];  // what the search found
    Moved moved_[MOST];
    Groups<weighted> lanes_;
    int index_[LANES];  // the groups in lanes
    float u_[LANES], v_[LANES];
};

template <bool weighted>
inline void encode_int4(const float* w, int64_t n, int k, const float* importance, uint8_t* out, size_t stride) {
    const int64_t most = Int4Rows<weighted>::most_rows(k);
    for (int64_t row = 0; row < n; row += most)
        Int4Rows<weighted>(w + row * k, k, importance, out + row * stride, stride)
            .encode(static_cast<int>(n - row < most ? n - row : most));
}

inline void encode_int4(const float* w, int64_t n, int k, const float* importance, uint8_t* out, size_t stride) {
    if (importance || k % INT4_GROUP) encode_int4<true>(w, n, k, importance, out, stride);
    else encode_int4<false>(w, n, k, importance, out, stride);
}

}  // namespace flashrt::FLASHRT_ISA
