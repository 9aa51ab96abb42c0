// Greedy steps among candidates of few dimensions on the CPU: candidates lie in buckets of neighbours, and a pick is
// compared only with buckets whose boxes are near enough.
//
// Buckets owns the candidates that can be picked at all, bucket after bucket: `split` cuts them into buckets, `pack`
// fills the arrays, then `best`, `close` and `take_in` run for every pick. Distances are those of exact_distances, bit
// for bit.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "core/round.h"
#include "cpu/buffer.h"
#include "kcenter/kcenter_distance.h"

namespace msacore::kcenter::cpu {

constexpr double kLowest = -std::numeric_limits<double>::infinity();

using Ranked = std::pair<double, int64_t>;  // score, index

// Higher scores first, smaller indices first among equals.
inline bool precedes(const Ranked& a, const Ranked& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

constexpr int64_t kFewDimensions = 8;  // with more, the boxes of neighbours overlap too much
constexpr int64_t kBucketRows = 64;

// Squared distances of at least this value do not lower `distance`. A square that vanishes in float64 is not a bound,
// except that of 0, because nothing is below 0. The factor is there because the root of a total may be below a distance
// although the total is not below the rounded square of that distance.
MSACORE_INLINE double bound_of(double distance) {
  const double square = distance * distance;
  return distance == 0 ? 0.0 : (square > kSafeLow ? square : kSafeLow) * (1 + 1e-15);
}

typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));
typedef double LanesInMemory __attribute__((vector_size(kLanes * sizeof(double)), aligned(sizeof(double)), may_alias));

// Squared distances [n] of rows x [kWidth, n] to a centre, n a multiple of kLanes; `range` gets the least and the
// largest. Returns whether any is below its row's entry of `square` [n].
template <int kWidth>
MSACORE_SIMD bool squared_distances(const double* __restrict__ x, int64_t n, const double* __restrict__ c,
                                    const double* __restrict__ square, double* __restrict__ out,
                                    double* __restrict__ range) {
  Lanes least = Lanes{} + std::numeric_limits<double>::infinity(), largest = {};
  auto below = largest < largest;
  for (int64_t r = 0; r < n; r += kLanes) {
    Lanes sum[kLanes] = {};
#pragma GCC unroll 8
    for (int j = 0; j < kWidth; ++j) {
      const Lanes gap = *reinterpret_cast<const LanesInMemory*>(x + j * n + r) - c[j];
      sum[j] += gap * gap;  // added to 0, as elsewhere: a bare product might be contracted with the sums below
    }
    // In the order of sum_lanes.
    const Lanes total = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
    *reinterpret_cast<LanesInMemory*>(out + r) = total;
    least = total < least ? total : least;
    largest = total > largest ? total : largest;
    below |= total < *reinterpret_cast<const LanesInMemory*>(square + r);
  }
  range[0] = least[0], range[1] = largest[0];
  bool any = false;
  for (int64_t k = 0; k < kLanes; ++k) {
    range[0] = std::min(range[0], least[k]);
    range[1] = std::max(range[1], largest[k]);
    any |= below[k] != 0;
  }
  return any;
}

// delta ← min(delta, √total), square ← delta² or a little more; score ← weight · delta for open rows, whose score is
// not -inf. Returns the largest score, and the largest delta in `farthest`.
MSACORE_SIMD inline double lower_distances(const double* __restrict__ total, const double* __restrict__ weight,
                                           int64_t n, double* __restrict__ delta, double* __restrict__ square,
                                           double* __restrict__ score, double* __restrict__ farthest) {
  double best = kLowest, largest = 0;
#pragma omp simd reduction(max : best, largest)
  for (int64_t r = 0; r < n; ++r) {
    const double root = std::sqrt(total[r]);
    const double now = root < delta[r] ? root : delta[r];
    const double value = score[r] == kLowest ? kLowest : weight[r] * now;
    delta[r] = now;
    square[r] = bound_of(now);
    score[r] = value;
    best = value > best ? value : best;
    largest = now > largest ? now : largest;
  }
  *farthest = largest;
  return best;
}

// out [n] ← lower bounds of the squared distances of a centre to boxes [n]
MSACORE_SIMD inline void box_distances(const double* low, const double* high, int64_t n, const double* c, int64_t d,
                                       double* __restrict__ out) {
  for (int64_t b = 0; b < n; ++b) out[b] = 0;
  for (int64_t j = 0; j < d; ++j) {
    const double* __restrict__ from = low + j * n, * __restrict__ to = high + j * n;
    const double at = c[j];
#pragma omp simd
    for (int64_t b = 0; b < n; ++b) {
      const double before = from[b] - at, behind = at - to[b];
      double gap = before > behind ? before : behind;
      gap = gap > 0 ? gap : 0.0;
      out[b] += gap * gap;
    }
  }
}

MSACORE_SIMD inline double largest_of(const double* __restrict__ values, int64_t n) {
  double largest = kLowest;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}

template <typename T>
class Buckets {
 public:
  Buckets(const T* x, const double* weight, const double* delta, const int64_t* index, int64_t m, int64_t d,
          Ranked bound)
      : x_(x), weight_(weight), delta_(delta), index_(index), d_(d) {
    for (int64_t i = 0; i < m; ++i)
      if (precedes({weight[i] * delta[i], index[i]}, bound)) order_.push_back(i);
    other_.resize(order_.size());
    split();
    pack();
  }

  // The bucket of the best open candidate, and the candidate's row in the arrays of all buckets; row -1: there is none.
  struct Place {
    int64_t bucket, row;
  };
  Place best() const {
    const double highest = largest_of(best_.get(), count());
    Place found{0, -1};
    if (highest == kLowest) return found;
    int64_t index = std::numeric_limits<int64_t>::max();
    for (int64_t b = 0; b < count(); ++b)
      if (best_[b] == highest)
        for (int64_t r = begins_[b]; r < begins_[b] + sizes_[b]; ++r)
          if (score_[r] == highest && index_[order_[r - padding_[b]]] < index) {
            index = index_[order_[r - padding_[b]]];
            found = {b, r};
          }
    return found;
  }
  int64_t position(const Place& place) const { return order_[place.row - padding_[place.bucket]]; }
  double score(const Place& place) const { return score_[place.row]; }

  void close(const Place& place) {
    score_[place.row] = kLowest;
    best_[place.bucket] = largest_of(score_.get() + begins_[place.bucket], padded_size(place.bucket));
  }

  // Lowers the distances by those to a further centre.
  void take_in(const double* center) {
    box_distances(low_.get(), high_.get(), count(), center, d_, bound_.get());
    // Allows for the rounding of a sum of d squares, with room to spare.
    constexpr double kSlack = 1 - 1e-12;
    for (int64_t b = 0; b < count(); ++b)
      if (bound_[b] * kSlack < reach_[b] || reach_[b] > kSafeHigh) lower(b, center);
  }

 private:
  int64_t count() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t padded_size(int64_t b) const { return round_up(sizes_[b], kLanes); }
  double at(int64_t i, int64_t j) const { return static_cast<double>(x_[order_[i] * d_ + j]); }

  // Cuts the candidates into buckets of at most kBucketRows, at the mean along the widest side of their box.
  void split() {
    struct Node {
      int64_t begin, end, cuts;
      std::vector<double> low, high;
    };
    const int64_t m = static_cast<int64_t>(order_.size());
    std::vector<double> low(d_, std::numeric_limits<double>::infinity()), high(d_, kLowest);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < d_; ++j) {
        low[j] = std::min(low[j], at(i, j));
        high[j] = std::max(high[j], at(i, j));
      }
    std::vector<Node> open;
    if (m) open.push_back({0, m, 0, low, high});
    while (!open.empty()) {
      Node node = std::move(open.back());
      open.pop_back();
      const int64_t rows = node.end - node.begin;
      if (rows <= kBucketRows) {
        sizes_.push_back(rows);
        firsts_.push_back(node.begin);
        continue;
      }
      const auto side = [&](int64_t j) { return node.high[j] - node.low[j]; };
      int64_t widest = 0;
      for (int64_t j = 1; j < d_; ++j)
        if (side(j) > side(widest)) widest = j;
      double cut = node.low.empty() ? 0 : node.low[widest];
      int64_t middle = node.begin;
      // Rows that pile up make cuts at the mean uneven: after this many cuts, rows are halved by number.
      constexpr int64_t kCuts = 48;
      if (node.cuts < kCuts && d_ > 0 && side(widest) > 0) {
        double sum = 0;
        for (int64_t i = node.begin; i < node.end; ++i) sum += at(i, widest);
        cut = sum / static_cast<double>(rows);
        middle = partition(node.begin, node.end, widest, cut);
      }
      const bool uneven = middle == node.begin || middle == node.end;
      if (uneven) middle = node.begin + rows / 2;
      Node right{middle, node.end, node.cuts + 1, node.low, node.high};
      node.end = middle, node.cuts += 1;
      if (!uneven) node.high[widest] = right.low[widest] = cut;
      open.push_back(std::move(right));
      open.push_back(std::move(node));
    }
  }

  // Brings rows below `cut` in one coordinate to the front, keeping their order; returns where the others begin.
  int64_t partition(int64_t begin, int64_t end, int64_t j, double cut) {
    int64_t front = begin, behind = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = order_[i];
      const bool first = static_cast<double>(x_[row * d_ + j]) < cut;
      order_[front] = row;
      other_[behind] = row;
      front += first;
      behind += !first;
    }
    std::copy(other_.begin(), other_.begin() + behind, order_.begin() + front);
    return front;
  }

  void pack() {
    int64_t all = 0;
    for (int64_t b = 0; b < count(); ++b) {
      begins_.push_back(all);
      padding_.push_back(all - firsts_[b]);
      all += padded_size(b);
    }
    rows_ = Buffer<double>(all * d_);
    own_weight_ = Buffer<double>(all, 0.0);
    own_delta_ = Buffer<double>(all, 0.0);
    square_ = Buffer<double>(all, 0.0);
    score_ = Buffer<double>(all, kLowest);
    best_ = Buffer<double>(count());
    reach_ = Buffer<double>(count());
    bound_ = Buffer<double>(count());
    low_ = Buffer<double>(count() * d_), high_ = Buffer<double>(count() * d_);
    for (int64_t b = 0; b < count(); ++b) {
      const int64_t n = padded_size(b), first = begins_[b];
      for (int64_t j = 0; j < d_; ++j) {
        double low = std::numeric_limits<double>::infinity(), high = kLowest;
        for (int64_t r = 0; r < n; ++r) {
          // Padding repeats a row, so that its distances are as safe as those of the others.
          const double value = at(firsts_[b] + std::min(r, sizes_[b] - 1), j);
          rows_[first * d_ + j * n + r] = value;
          low = std::min(low, value);
          high = std::max(high, value);
        }
        low_[j * count() + b] = low;
        high_[j * count() + b] = high;
      }
      double farthest = 0;
      for (int64_t r = 0; r < sizes_[b]; ++r) {
        const int64_t i = order_[firsts_[b] + r];
        own_weight_[first + r] = weight_[i];
        own_delta_[first + r] = delta_[i];
        square_[first + r] = bound_of(delta_[i]);
        score_[first + r] = weight_[i] * delta_[i];
        farthest = std::max(farthest, delta_[i]);
      }
      best_[b] = largest_of(score_.get() + first, n);
      reach_[b] = bound_of(farthest);
    }
  }

  void lower(int64_t b, const double* center) {
    const int64_t n = padded_size(b), first = begins_[b];
    double total[kBucketRows], range[2];
    const double* const rows = rows_.get() + first * d_;
    const bool below = distances(rows, n, center, square_.get() + first, total, range);
    if (!is_safe(range[0]) || !is_safe(range[1])) {
      for (int64_t r = 0; r < n; ++r) {
        if (is_safe(total[r])) continue;
        double row[kFewDimensions], distance;
        for (int64_t j = 0; j < d_; ++j) row[j] = rows[j * n + r];
        const int64_t only = 0;
        exact_distances(row, center, &only, 1, d_, kEuclidean, &distance);
        own_delta_[first + r] = std::min(own_delta_[first + r], distance);
        total[r] = std::numeric_limits<double>::infinity();
      }
    } else if (!below) {
      return;
    }
    double farthest;
    best_[b] = lower_distances(total, own_weight_.get() + first, n, own_delta_.get() + first, square_.get() + first,
                               score_.get() + first, &farthest);
    reach_[b] = bound_of(farthest);
  }

  bool distances(const double* rows, int64_t n, const double* center, const double* square, double* total,
                 double* range) const {
    switch (d_) {
      case 1:
        return squared_distances<1>(rows, n, center, square, total, range);
      case 2:
        return squared_distances<2>(rows, n, center, square, total, range);
      case 3:
        return squared_distances<3>(rows, n, center, square, total, range);
      case 4:
        return squared_distances<4>(rows, n, center, square, total, range);
      case 5:
        return squared_distances<5>(rows, n, center, square, total, range);
      case 6:
        return squared_distances<6>(rows, n, center, square, total, range);
      case 7:
        return squared_distances<7>(rows, n, center, square, total, range);
      default:
        return squared_distances<kFewDimensions>(rows, n, center, square, total, range);
    }
  }

  const T* x_;
  const double *weight_, *delta_;
  const int64_t* index_;
  const int64_t d_;
  std::vector<int64_t> order_, other_;  // candidates, bucket after bucket; scratch memory of partition()
  std::vector<int64_t> firsts_, sizes_, begins_, padding_;  // per bucket: first in order_, rows, first below, gap
  Buffer<double> rows_;                                     // [d, size] of every bucket
  Buffer<double> own_weight_, own_delta_, square_, score_;  // of every row; score -inf: closed
  Buffer<double> best_, reach_, bound_;                     // of every bucket
  Buffer<double> low_, high_;                               // [d, buckets]
};

// greedy() of kcenter_steps.h for euclidean distances in 1 to kFewDimensions dimensions.
template <typename T>
void greedy_in_buckets(const T* candidates, const double* weight, const double* delta, const int64_t* index,
                       const int64_t* group, std::vector<int64_t> room, int64_t m, int64_t d, Ranked bound,
                       int64_t limit, int64_t* picks, double* scores) {
  Buckets<T> buckets(candidates, weight, delta, index, m, d, bound);
  double center[kFewDimensions];
  for (int64_t made = 0; made < limit;) {
    const auto place = buckets.best();
    if (place.row < 0) return;
    const int64_t position = buckets.position(place);
    const double score = buckets.score(place);
    if (!precedes({score, index[position]}, bound)) return;
    buckets.close(place);
    if (group && room[group[position]]-- <= 0) continue;
    picks[made] = position;
    scores[made++] = score;
    for (int64_t j = 0; j < d; ++j) center[j] = static_cast<double>(candidates[position * d + j]);
    buckets.take_in(center);
  }
}

}  // namespace msacore::kcenter::cpu
