// One anchor of Rank-N-Contrast: passes over its distances to the n samples, and over the others by falling label gap.
//
// In that order the sum over "gap at least that of j" is a running sum, complete at the end of j's group of equal gaps.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/dtype.h"
#include "cpu/exp.h"
#include "cpu/simd.h"
#include "rank_n_contrast/rank_n_contrast_labels.h"

namespace msacore::rank_n_contrast::cpu {

// Below this share of |a|² + |b|² the expanded form |a|² + |b|² - 2ab of a squared distance cancels too much.
template <typename A>
constexpr A kNear = A(1) / 64;

// Scratch memory of one thread.
template <typename A>
struct Row {
  Order order;
  std::vector<double> sum, top;
  std::vector<A> weight, offset;
  std::vector<int32_t> near;
  explicit Row(int64_t n) : order(n), sum(n), top(n), weight(n) {}
};

// Products of centred rows, entering in `row`, become distances, or -1 where near; returns how many are near.
template <typename A>
MSACORE_SIMD int64_t distances(A* __restrict__ row, const A* __restrict__ square, int64_t self, int64_t n) {
  const A own = square[self];
  int64_t near = 0;
  for (int64_t j = 0; j < n; ++j) {
    const A total = own + square[j], d2 = total - 2 * row[j];
    const A kept = d2 <= kNear<A> * total ? A(-1) : d2;  // not the reverse: NaN is kept
    near += kept < 0;
    row[j] = kept;
  }
  for (int64_t j = 0; j < n; ++j) row[j] = row[j] < 0 ? A(-1) : std::sqrt(row[j]);
  return near;
}

// The similarities s = -distance / temperature of a row, relative to its largest one, `top`.
struct Similarities {
  double nearest;      // the distance of `top`
  double range, fall;  // the largest of all top - s, and their sum
};

// exp(s - top) into `weight`. At the anchor itself, `distance` must hold the distance of another sample, so that it
// affects no result.
template <typename A>
MSACORE_SIMD Similarities exponentials(const A* __restrict__ distance, A inverse_temperature, int64_t self, int64_t n,
                                       A* __restrict__ weight) {
  A nearest = std::numeric_limits<A>::infinity(), farthest = -nearest;
#pragma omp simd reduction(min : nearest) reduction(max : farthest)
  for (int64_t j = 0; j < n; ++j) {
    nearest = distance[j] < nearest ? distance[j] : nearest;
    farthest = distance[j] > farthest ? distance[j] : farthest;
  }
  double fall = 0;
#pragma omp simd reduction(+ : fall)
  for (int64_t j = 0; j < n; ++j) {
    const A step = (distance[j] - nearest) * inverse_temperature;
    weight[j] = exp_of(-step);
    fall += step;
  }
  fall -= (distance[self] - nearest) * inverse_temperature;
  return {nearest, (static_cast<double>(farthest) - nearest) * inverse_temperature, fall};
}

// s - top into `weight`.
template <typename A>
void similarities_below_top(const A* distance, A inverse_temperature, int64_t n, A* weight) {
  const A nearest = *std::min_element(distance, distance + n);
  for (int64_t j = 0; j < n; ++j) weight[j] = (nearest - distance[j]) * inverse_temperature;
}

// Beyond this range of similarities exp(s - top), or a sum of inverses, could leave the range of type A.
template <typename A>
constexpr double kNarrow = sizeof(A) == 8 ? 300 : 60;

// The end of the group of equal gaps that begins at `begin`.
MSACORE_INLINE int64_t group_end(const Order& order, int64_t begin) {
  while (!order.ends[begin]) ++begin;
  return begin + 1;
}
MSACORE_INLINE int64_t group_begin(const Order& order, int64_t last) {
  while (last > 0 && !order.ends[last - 1]) --last;
  return last;
}

// sum[r] = Σ exp(s_k - top) over gaps at least that of the r-th; returns Σ_r log sum[r].
template <typename A>
double running_sums(Row<A>& row, int64_t count) {
  double sum = 0, product = 1, logarithm = 0;
  for (int64_t r = 0; r < count;) {
    const int64_t end = group_end(row.order, r);
    for (int64_t k = r; k < end; ++k) sum += row.weight[row.order.place[k]];
    for (; r < end; ++r) {
      row.sum[r] = sum;
      product *= sum;
      if (product < 1e-150 || product > 1e150) {  // one logarithm for many factors
        logarithm += std::log(product);
        product = 1;
      }
    }
  }
  return logarithm + std::log(product);
}

// d(row loss)/ds over `weight`: exp(s_k) Σ_{gaps at most that of k} 1 / sum - 1.
template <typename A>
void gradient_of_sums(Row<A>& row, int64_t count) {
  double inverse = 0;
  for (int64_t r = count - 1; r >= 0;) {
    const int64_t begin = group_begin(row.order, r);
    inverse += static_cast<double>(r - begin + 1) / row.sum[r];
    for (; r >= begin; --r) {
      A& weight = row.weight[row.order.place[r]];
      weight = static_cast<A>(weight * inverse - 1);
    }
  }
}

// log Σ exp of what was added, whatever its range.
struct LogSum {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  void add(double exponent, double times = 1) {
    if (exponent > top) {
      sum = sum * std::exp(top - exponent) + times;
      top = exponent;
    } else {
      sum += times * std::exp(exponent - top);
    }
  }
};

// running_sums and gradient_of_sums for rows of wide range. A sum is kept as sum[r] · exp(top[r]), in two numbers:
// added to a large `top`, the logarithm of sum[r] would be lost, and with it how many samples tie. `weight` keeps
// s - top.
template <typename A>
double running_logarithms(Row<A>& row, int64_t count) {
  LogSum sum;
  double logarithm = 0;
  for (int64_t r = 0; r < count;) {
    const int64_t end = group_end(row.order, r);
    for (int64_t k = r; k < end; ++k) sum.add(row.weight[row.order.place[k]]);
    logarithm += (sum.top + std::log(sum.sum)) * static_cast<double>(end - r);
    for (; r < end; ++r) {
      row.sum[r] = sum.sum;
      row.top[r] = sum.top;
    }
  }
  return logarithm;
}

template <typename A>
void gradient_of_logarithms(Row<A>& row, int64_t count) {
  LogSum inverse;
  for (int64_t r = count - 1; r >= 0;) {
    const int64_t begin = group_begin(row.order, r);
    inverse.add(-row.top[r], static_cast<double>(r - begin + 1) / row.sum[r]);
    for (; r >= begin; --r) {
      A& weight = row.weight[row.order.place[r]];
      weight = static_cast<A>(std::exp(weight + inverse.top) * inverse.sum - 1);
    }
  }
}

// Σ weight · (distance - nearest)
template <typename A>
MSACORE_SIMD double weighted_distances(const A* __restrict__ weight, const A* __restrict__ distance, double nearest,
                                       int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += weight[j] * (distance[j] - nearest);
  return sum;
}

// distance ← d(row loss)/ds in `weight`, scaled and divided by the distance: the factor of e_self - e_j in the
// gradient.
template <typename A>
MSACORE_SIMD void divide_by_distance(const A* __restrict__ weight, A scale, A* __restrict__ distance, int64_t n) {
  for (int64_t j = 0; j < n; ++j) distance[j] = scale * weight[j] / distance[j];
}

}  // namespace msacore::rank_n_contrast::cpu
