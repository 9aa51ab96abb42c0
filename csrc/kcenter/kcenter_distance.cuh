// Distances of selection on the device, by the formula of kcenter_distance.h: eight partial sums of fused
// multiply-adds, added up in one order, so that a distance depends on its two rows alone.
#pragma once
#include "cuda/rows.cuh"

namespace msacore::kcenter::cuda {
using namespace msacore::cuda;

constexpr int kGroup = 8;  // lanes that own a pair, or partial sums of a thread that owns one
constexpr int kThreads = 256;

// 1 - cos from products; a zero row has distance 1 to everything.
__device__ __forceinline__ double cosine_distance(double xc, double xx, double cc) {
  constexpr double kSmallestNormal = 2.2250738585072014e-308, kLargest = 1.7976931348623157e308;
  if (xx == 0 || cc == 0) return 1;
  const double product = xx * cc;
  const bool normal = product >= kSmallestNormal && product <= kLargest;
  const double scale = normal ? sqrt(product) : sqrt(xx) * sqrt(cc);
  return fmax(0.0, 1 - xc / scale);
}

// Distance of rows x and c, [d], found by eight neighbouring lanes that call together; every one gets it.
template <bool kCosine, typename T>
__device__ __forceinline__ double group_distance(const T* x, const double* c, int64_t d) {
  double first = 0, xx = 0, cc = 0;
  for (int64_t j = lane_id() % kGroup; j < d; j += kGroup) {
    const double a = static_cast<double>(x[j]), b = c[j];
    if constexpr (kCosine) {
      first = fma(a, b, first);
      xx = fma(a, a, xx);
      cc = fma(b, b, cc);
    } else {
      first = fma(a - b, a - b, first);
    }
  }
  first = group_sum(first, kGroup);
  if constexpr (!kCosine) return sqrt(first);
  return cosine_distance(first, group_sum(xx, kGroup), group_sum(cc, kGroup));
}

// The terms of one thread's pair: their sum, and the next one added to partial sum k.
template <bool kCosine>
struct PairSum {
  double sum[kGroup] = {};

  __device__ __forceinline__ void add(int k, double a, double b) {
    sum[k] = kCosine ? fma(a, b, sum[k]) : fma(a - b, a - b, sum[k]);
  }
  __device__ __forceinline__ double total() const {
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
  }
  // xx and cc: squared norms, for cosine.
  __device__ __forceinline__ double distance(double xx, double cc) const {
    return kCosine ? cosine_distance(total(), xx, cc) : sqrt(total());
  }
};

// Doubles as unsigned numbers in the same order, for integer atomics and sorting.
__device__ __forceinline__ unsigned long long ordered_bits(double value) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(value));
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}
__device__ __forceinline__ double from_ordered_bits(unsigned long long bits) {
  return __longlong_as_double(static_cast<long long>(bits >> 63 ? bits & ~(1ull << 63) : ~bits));
}

}  // namespace msacore::kcenter::cuda
