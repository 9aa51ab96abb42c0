// Embeddings relative to a centre, in units of their spread, so that products of them neither overflow nor cancel; and
// the rows that are so far out that they must be kept apart.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/dtype.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace msacore::rank_n_contrast::cpu {
using namespace msacore::cpu;

// A row is far where it lies more than this many times the median away. The contract's bound is 2^10 from the mean;
// from a row instead of the mean, distances are up to √2 times as long, and so is the median.
constexpr double kFar = 512;
// The mean is taken over the rows up to this many times the median away.
constexpr double kMeanReach = 8;

template <typename T>
MSACORE_SIMD double sum_of_squares(const T* __restrict__ a, const T* __restrict__ b, int64_t width) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < width; ++c) {
    const double difference = static_cast<double>(static_cast<acc_t<T>>(a[c])) - static_cast<acc_t<T>>(b[c]);
    sum += difference * difference;
  }
  return sum;
}

// ‖a - b‖. Squares of float32 numbers are in range of float64; a sum of float64 ones that is out of range is taken
// again, in units of the largest difference.
template <typename T>
double distance_between(const T* a, const T* b, int64_t width) {
  const double sum = sum_of_squares(a, b, width);
  if (!std::is_same_v<T, double> || (sum > 1e-280 && sum < 1e300) || sum != sum) return std::sqrt(sum);
  double largest = 0;
  for (int64_t c = 0; c < width; ++c) largest = std::max(largest, std::abs(static_cast<double>(a[c] - b[c])));
  if (largest == 0 || std::isinf(largest)) return largest;
  double scaled = 0;
  for (int64_t c = 0; c < width; ++c) {
    const double difference = (a[c] - b[c]) / largest;
    scaled += difference * difference;
  }
  return largest * std::sqrt(scaled);
}

// How far the samples lie from one of them, the one at the median distance from the first: if fewer than half of the
// rows are far out, it is not far out itself.
struct Spread {
  int64_t middle = 0;
  std::vector<double> norm;  // [n]: distance from `middle`
  double median = 0, largest = 0;
  int exponent = 0;  // of the unit of length 2^exponent

  template <typename T>
  Spread(const T* embeddings, const std::vector<int64_t>& sample, int64_t width) : norm(sample.size()) {
    const auto measure = [&] {
      const T* from = embeddings + sample[middle] * width;
      parallel_for(0, static_cast<int64_t>(norm.size()), 256, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          const double distance = distance_between(embeddings + sample[p] * width, from, width);
          norm[p] = distance == distance ? distance : std::numeric_limits<double>::infinity();
        }
      });
      std::vector<double> sorted(norm);
      const auto half = sorted.begin() + (sorted.size() - 1) / 2;
      std::nth_element(sorted.begin(), half, sorted.end());
      median = *half;
    };
    measure();
    middle = std::find(norm.begin(), norm.end(), median) - norm.begin();
    measure();
    largest = *std::max_element(norm.begin(), norm.end());
    const double unit = median > 0 ? median : largest;
    if (unit > 0) exponent = std::isinf(unit) ? 1000 : std::clamp(std::ilogb(unit), -1000, 1000);
  }

  bool is_far(int64_t place) const { return !(norm[place] <= kFar * median); }
  bool any_far() const { return !(largest <= kFar * median); }
  double to_units() const { return std::ldexp(1.0, -exponent); }
};

// ‖own - row‖ - ‖own - middle‖ as <middle - row, (own - row) + (own - middle)> / (the sum of both distances), which far
// away keeps the digits that the difference of two long distances would cancel.
template <typename T>
MSACORE_SIMD double offset_from(const T* __restrict__ own, const T* __restrict__ row, const T* __restrict__ middle,
                                int64_t width, double inverse_sum) {
  double offset = 0;
#pragma omp simd reduction(+ : offset)
  for (int64_t c = 0; c < width; ++c) {
    const double o = static_cast<acc_t<T>>(own[c]), r = static_cast<acc_t<T>>(row[c]),
                 m = static_cast<acc_t<T>>(middle[c]);
    offset += (m - r) * (((o - r) + (o - m)) * inverse_sum);
  }
  return offset;
}

// own -= and other += factor · (e_own - e_other), columns begin … end.
template <typename T, typename A>
MSACORE_SIMD void add_difference(A factor, double to_units, const T* __restrict__ e_own, const T* __restrict__ e_other,
                                 int64_t begin, int64_t end, A* __restrict__ own, A* __restrict__ other) {
  for (int64_t c = begin; c < end; ++c) {
    const double difference = static_cast<double>(static_cast<acc_t<T>>(e_own[c])) - static_cast<acc_t<T>>(e_other[c]);
    const A term = factor * static_cast<A>(difference * to_units);
    own[c] -= term;
    other[c] += term;
  }
}

}  // namespace msacore::rank_n_contrast::cpu
