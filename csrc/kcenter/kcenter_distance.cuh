// Distances for selection on the device, by the formula of kcenter_distance.h: eight partial sums of fused
// multiply-adds, added up in one fixed order, so that a distance depends on its two rows alone.
#pragma once
#include "cuda/rows.cuh"

namespace msacore::kcenter::cuda {
using namespace msacore::cuda;

constexpr int kGroup = 8;  // lanes that own a pair, or partial sums of a thread that owns one
constexpr int kThreads = 256;

// Sums of squares outside these bounds may have lost digits to underflow, or be infinite.
constexpr double kSafeLow = 1e-280, kSafeHigh = 1e280;

__device__ __forceinline__ bool is_safe(double sum) { return sum > kSafeLow && sum < kSafeHigh; }

// Exponent e for which max|value(j)| · 2^-e is in [0.5, 1), or 0 where all values are 0.
template <typename Value>
__device__ int exponent_of(int64_t d, const Value& value) {
  double largest = 0;
  for (int64_t j = 0; j < d; ++j) largest = fmax(largest, fabs(value(j)));
  int exponent = 0;
  if (largest > 0 && largest <= 1.7976931348623157e308) frexp(largest, &exponent);
  return exponent;
}

// Distance of rows whose squares float64 cannot hold: numbers are brought to about 1 by powers of two. One thread.
template <bool kCosine, typename T, typename C>
__device__ double rescaled_distance(const T* x, const C* c, int64_t d) {
  const auto row = [&](int64_t j) { return static_cast<double>(x[j]); };
  const auto center = [&](int64_t j) { return static_cast<double>(c[j]); };
  double first = 0, xx = 0, cc = 0;
  if constexpr (!kCosine) {
    const auto gap = [&](int64_t j) { return row(j) - center(j); };
    const int exponent = exponent_of(d, gap);
    for (int64_t j = 0; j < d; ++j) {
      const double scaled = ldexp(gap(j), -exponent);
      first = fma(scaled, scaled, first);
    }
    return ldexp(sqrt(first), exponent);
  }
  const int x_exponent = exponent_of(d, row), c_exponent = exponent_of(d, center);
  for (int64_t j = 0; j < d; ++j) {
    const double a = ldexp(row(j), -x_exponent), b = ldexp(center(j), -c_exponent);
    first = fma(a, b, first);
    xx = fma(a, a, xx);
    cc = fma(b, b, cc);
  }
  return xx == 0 || cc == 0 ? 1 : fmax(0.0, 1 - first / sqrt(xx * cc));
}

// 1 - cos from <x, c> and the squared norms, which are safe.
__device__ __forceinline__ double cosine_distance(double xc, double xx, double cc) {
  const double product = xx * cc;
  const double scale = is_safe(product) ? sqrt(product) : sqrt(xx) * sqrt(cc);
  return fmax(0.0, 1 - xc / scale);
}

// Distance of rows x and c, [d], computed by eight neighbouring lanes that call together; every lane gets it.
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
  if constexpr (!kCosine) return is_safe(first) ? sqrt(first) : rescaled_distance<kCosine>(x, c, d);
  xx = group_sum(xx, kGroup);
  cc = group_sum(cc, kGroup);
  return is_safe(xx) && is_safe(cc) ? cosine_distance(first, xx, cc) : rescaled_distance<kCosine>(x, c, d);
}

// Sum of the terms of one thread's pair; `add` adds the next term to partial sum k.
template <bool kCosine>
struct PairSum {
  double sum[kGroup] = {};

  __device__ __forceinline__ void add(int k, double a, double b) {
    sum[k] = kCosine ? fma(a, b, sum[k]) : fma(a - b, a - b, sum[k]);
  }
  __device__ __forceinline__ double total() const {
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
  }
  // Distance of rows x and c, [d]; xx and cc are their squared norms, for cosine.
  template <typename T>
  __device__ __forceinline__ double distance(const T* x, const T* c, int64_t d, double xx, double cc) const {
    if (kCosine ? !(is_safe(xx) && is_safe(cc)) : !is_safe(total())) return rescaled_distance<kCosine>(x, c, d);
    return kCosine ? cosine_distance(total(), xx, cc) : sqrt(total());
  }
};

// Maps doubles to unsigned numbers in the same order, for integer atomics and sorting.
__device__ __forceinline__ unsigned long long ordered_bits(double value) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(value));
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}
__device__ __forceinline__ double from_ordered_bits(unsigned long long bits) {
  return __longlong_as_double(static_cast<long long>(bits >> 63 ? bits & ~(1ull << 63) : ~bits));
}

}  // namespace msacore::kcenter::cuda
