// One anchor of Rank-N-Contrast: passes over the n samples, which are stored by rising target, with the anchor at
// `self`.
//
// Seen from the anchor, the label gap falls from both ends towards it. Merging the two sides from outside in visits the
// others by falling gap, so the sum over "gap at least that of j" is a running sum, complete at the end of j's tie
// group.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/dtype.h"
#include "cpu/exp.h"
#include "cpu/simd.h"

namespace msacore::rank_n_contrast::cpu {
using namespace msacore::cpu;

// Below this share of |a|² + |b|² the expanded form |a|² + |b|² - 2ab of a squared distance cancels too much.
template <typename A>
constexpr A kNear = A(1) / 64;

// Scratch of one thread.
template <typename A>
struct Row {
  std::vector<double> gap, sum;
  std::vector<A> weight;
  std::vector<int32_t> order, near;
  explicit Row(int64_t n) : gap(n), sum(n), weight(n), order(n) {}
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

template <typename T>
MSACORE_SIMD acc_t<T> distance_between(const T* __restrict__ a, const T* __restrict__ b, int64_t width) {
  acc_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < width; ++c) {
    const acc_t<T> difference = static_cast<acc_t<T>>(a[c]) - static_cast<acc_t<T>>(b[c]);
    sum += difference * difference;
  }
  return std::sqrt(sum);
}

// |y_self - y_j| rounded as the dtype of the targets rounds it; returns whether all are numbers.
template <typename Target>
MSACORE_SIMD bool label_gaps(const acc_t<Target>* __restrict__ y, int64_t self, int64_t n, double* __restrict__ gap) {
  const acc_t<Target> own = y[self];
  int64_t bad = 0;
  for (int64_t j = 0; j < n; ++j) {
    const acc_t<Target> rounded = static_cast<acc_t<Target>>(static_cast<Target>(own - y[j]));
    gap[j] = std::abs(static_cast<double>(rounded));
    bad += rounded != rounded;
  }
  return bad == 0;
}

// The others by falling gap, into order[0 … n-2].
MSACORE_SIMD inline void merge_by_gap(double* __restrict__ gap, int64_t self, int64_t n, int32_t* __restrict__ order) {
  gap[self] = -1;  // last of all
  int64_t low = 0, high = n - 1;
  for (int64_t r = 0; r < n - 1; ++r) {
    const bool take_low = gap[low] >= gap[high];
    order[r] = static_cast<int32_t>(take_low ? low : high);
    low += take_low;
    high -= !take_low;
  }
}

// The similarities s = -distance / temperature of a row, below its largest one, `top`.
struct Similarities {
  double range, fall;  // the largest top - s, and the sum of all
};

// exp(s - top) into `weight`. The anchor itself must hold the distance of another sample, so that it changes nothing.
template <typename A>
MSACORE_SIMD Similarities exponentials(const A* __restrict__ distance, A inverse_temperature, int64_t self, int64_t n,
                                       A* __restrict__ weight) {
  A nearest = std::numeric_limits<A>::infinity(), farthest = 0;
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
  return {(static_cast<double>(farthest) - nearest) * inverse_temperature, fall};
}

// s - top into `weight`.
template <typename A>
void similarities_below_top(const A* distance, A inverse_temperature, int64_t n, A* weight) {
  const A nearest = *std::min_element(distance, distance + n);
  for (int64_t j = 0; j < n; ++j) weight[j] = (nearest - distance[j]) * inverse_temperature;
}

// Beyond this range of similarities exp(s - top), or a sum of inverses, could leave the numbers of type A.
template <typename A>
constexpr double kNarrow = sizeof(A) == 8 ? 300 : 60;

template <typename A>
MSACORE_INLINE int64_t group_end(const Row<A>& row, int64_t begin, int64_t count) {
  const double gap = row.gap[row.order[begin]];
  int64_t end = begin + 1;
  while (end < count && row.gap[row.order[end]] == gap) ++end;
  return end;
}

// sum[r] = Σ exp(s_k - top) over gaps at least that of order[r]; returns Σ_r log sum[r].
template <typename A>
double running_sums(Row<A>& row, int64_t count) {
  double sum = 0, product = 1, logarithm = 0;
  for (int64_t r = 0; r < count;) {
    const int64_t end = group_end(row, r, count);
    for (int64_t k = r; k < end; ++k) sum += row.weight[row.order[k]];
    for (; r < end; ++r) {
      row.sum[r] = sum;
      product *= sum;
      if (product < 1e-150 || product > 1e150) {  // a logarithm for many factors at once
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
    const double gap = row.gap[row.order[r]];
    int64_t begin = r;
    while (begin > 0 && row.gap[row.order[begin - 1]] == gap) --begin;
    inverse += static_cast<double>(r - begin + 1) / row.sum[r];
    for (; r >= begin; --r) {
      A& weight = row.weight[row.order[r]];
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

// The two functions above for rows of wide range, in logarithms; sum[r] holds a logarithm, `weight` keeps s - top.
template <typename A>
double running_logarithms(Row<A>& row, int64_t count) {
  LogSum sum;
  double logarithm = 0;
  for (int64_t r = 0; r < count;) {
    const int64_t end = group_end(row, r, count);
    for (int64_t k = r; k < end; ++k) sum.add(row.weight[row.order[k]]);
    const double value = sum.top + std::log(sum.sum);
    logarithm += value * static_cast<double>(end - r);
    for (; r < end; ++r) row.sum[r] = value;
  }
  return logarithm;
}

template <typename A>
void gradient_of_logarithms(Row<A>& row, int64_t count) {
  LogSum inverse;
  for (int64_t r = count - 1; r >= 0;) {
    const double gap = row.gap[row.order[r]];
    int64_t begin = r;
    while (begin > 0 && row.gap[row.order[begin - 1]] == gap) --begin;
    inverse.add(-row.sum[r], static_cast<double>(r - begin + 1));
    for (; r >= begin; --r) {
      A& weight = row.weight[row.order[r]];
      weight = static_cast<A>(std::exp(weight + inverse.top) * inverse.sum - 1);
    }
  }
}

// d(row loss)/ds in `weight`, scaled and divided by the distance: how far e_self - e_j counts in the gradient.
template <typename A>
MSACORE_SIMD void divide_by_distance(const A* __restrict__ weight, A scale, A* __restrict__ distance, int64_t n) {
  for (int64_t j = 0; j < n; ++j) distance[j] = scale * weight[j] / distance[j];
}

template <typename A>
MSACORE_SIMD void add_range(A* __restrict__ to, const A* __restrict__ from, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) to[i] += from[i];
}

}  // namespace msacore::rank_n_contrast::cpu
