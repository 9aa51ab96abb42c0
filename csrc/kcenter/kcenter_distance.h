// Distances for selection on the CPU: the one exact formula on which all decisions rest, and the float32 filter before
// it.
#pragma once
#include <cmath>
#include <cstring>

#include "core/dtype.h"
#include "cpu/simd.h"
#include "kcenter/kcenter.h"

namespace msacore::kcenter::cpu {
using namespace msacore::cpu;

// Eight partial sums in a fixed order: the result depends on the two rows alone, not on tiles or threads.
constexpr int64_t kLanes = 8;

MSACORE_INLINE double sum_lanes(const double* s) {
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// Sums of squares outside these bounds may have lost digits to underflow, or be infinite.
constexpr double kSafeLow = 1e-280, kSafeHigh = 1e280;

inline bool is_safe(double sum) { return sum > kSafeLow && sum < kSafeHigh; }

// Exponent e for which max|value(j)| · 2^-e is in [0.5, 1), or 0 where all values are 0.
template <typename Value>
int exponent_of(int64_t d, const Value& value) {
  double largest = 0;
  for (int64_t j = 0; j < d; ++j) largest = std::fmax(largest, std::fabs(value(j)));
  int exponent = 0;
  if (largest > 0 && std::isfinite(largest)) std::frexp(largest, &exponent);
  return exponent;
}

// Distance of rows whose squares float64 cannot hold: numbers are brought to about 1 by powers of two.
template <typename T>
double rescaled_distance(const T* x, const double* c, int64_t d, int64_t metric) {
  const auto row = [&](int64_t j) { return static_cast<double>(x[j]); };
  double first = 0, xx = 0, cc = 0;
  if (metric == kEuclidean) {
    const auto gap = [&](int64_t j) { return row(j) - c[j]; };
    const int exponent = exponent_of(d, gap);
    for (int64_t j = 0; j < d; ++j) first += std::ldexp(gap(j), -exponent) * std::ldexp(gap(j), -exponent);
    return std::ldexp(std::sqrt(first), exponent);
  }
  const int x_exponent = exponent_of(d, row), c_exponent = exponent_of(d, [&](int64_t j) { return c[j]; });
  for (int64_t j = 0; j < d; ++j) {
    const double a = std::ldexp(row(j), -x_exponent), b = std::ldexp(c[j], -c_exponent);
    first += a * b;
    xx += a * a;
    cc += b * b;
  }
  return xx == 0 || cc == 0 ? 1 : std::fmax(0.0, 1 - first / std::sqrt(xx * cc));
}

template <typename T>
MSACORE_INLINE double euclidean_distance(const T* __restrict__ x, const double* __restrict__ c, int64_t d) {
  double sum[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) {
#pragma omp simd
    for (int64_t k = 0; k < kLanes; ++k) {
      const double gap = static_cast<double>(x[j + k]) - c[j + k];
      sum[k] += gap * gap;
    }
  }
  for (int64_t k = 0; j < d; ++j, ++k) {
    const double gap = static_cast<double>(x[j]) - c[j];
    sum[k] += gap * gap;
  }
  const double total = sum_lanes(sum);
  return is_safe(total) ? std::sqrt(total) : rescaled_distance(x, c, d, kEuclidean);
}

// 1 - cos; a zero row has distance 1 to everything. The root of the product makes equal rows give exactly 0.
template <typename T>
MSACORE_INLINE double cosine_distance(const T* __restrict__ x, const double* __restrict__ c, int64_t d) {
  double xc[kLanes] = {}, xx[kLanes] = {}, cc[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) {
#pragma omp simd
    for (int64_t k = 0; k < kLanes; ++k) {
      const double a = static_cast<double>(x[j + k]), b = c[j + k];
      xc[k] += a * b;
      xx[k] += a * a;
      cc[k] += b * b;
    }
  }
  for (int64_t k = 0; j < d; ++j, ++k) {
    const double a = static_cast<double>(x[j]), b = c[j];
    xc[k] += a * b;
    xx[k] += a * a;
    cc[k] += b * b;
  }
  const double x_norm2 = sum_lanes(xx), c_norm2 = sum_lanes(cc);
  if (!is_safe(x_norm2) || !is_safe(c_norm2)) return rescaled_distance(x, c, d, kCosine);
  const double product = x_norm2 * c_norm2;
  const double scale = is_safe(product) ? std::sqrt(product) : std::sqrt(x_norm2) * std::sqrt(c_norm2);
  return std::fmax(0.0, 1 - sum_lanes(xc) / scale);
}

// <x - shift, c>, summed as distances are
template <typename T>
MSACORE_SIMD void products(const T* __restrict__ x, const double* __restrict__ shift, const double* centers,
                           int64_t count, int64_t d, double* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    const double* __restrict__ c = centers + i * d;
    double sum[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= d; j += kLanes) {
#pragma omp simd
      for (int64_t k = 0; k < kLanes; ++k) sum[k] += (static_cast<double>(x[j + k]) - shift[j + k]) * c[j + k];
    }
    for (int64_t k = 0; j < d; ++j, ++k) sum[k] += (static_cast<double>(x[j]) - shift[j]) * c[j];
    out[i] = sum_lanes(sum);
  }
}

// out[i] = distance of row x to centre which[i]
template <typename T>
MSACORE_SIMD void exact_distances(const T* x, const double* centers, const int64_t* which, int64_t count, int64_t d,
                                  int64_t metric, double* out) {
  for (int64_t i = 0; i < count; ++i) {
    const double* c = centers + which[i] * d;
    out[i] = metric == kEuclidean ? euclidean_distance(x, c, d) : cosine_distance(x, c, d);
  }
}

// The filter: rows and centres in float32, moved by `shift` and scaled by a power of two (or to unit length), so that
// half · (‖x‖² + ‖c‖² - 2 <x, c>) approximates the squared distance (for cosine: the cosine distance) up to
// slack · half · (‖x‖² + ‖c‖²).
struct Filter {
  int64_t metric, d;
  double scale;

  // Rounding to float32, a product summed in any order and three additions err by (d + 6) u (‖x‖ + ‖c‖)², and
  // (‖x‖ + ‖c‖)² <= 2 (‖x‖² + ‖c‖²).
  double slack() const { return 2.0 * static_cast<double>(d + 16) * 5.97e-8; }
  double half() const { return metric == kEuclidean ? 1.0 : 0.5; }
  // A distance in the filter's units.
  double units(double distance) const {
    return metric == kEuclidean ? (distance * scale) * (distance * scale) : distance;
  }
};

// Squares below this may vanish in float32.
constexpr double kTiny = 1e-30;

// pack_row, for cosine, of a row whose squares float64 cannot hold: out [d] = its unit row, or zeros for a row of
// zeros.
template <typename T>
double pack_rescaled_row(const T* x, int64_t d, float* out) {
  const int exponent = exponent_of(d, [&](int64_t j) { return static_cast<double>(x[j]); });
  const auto value = [&](int64_t j) { return std::ldexp(static_cast<double>(x[j]), -exponent); };
  double norm2 = 0;
  for (int64_t j = 0; j < d; ++j) norm2 += value(j) * value(j);
  for (int64_t j = 0; j < d; ++j) out[j] = norm2 > 0 ? static_cast<float>(value(j) / std::sqrt(norm2)) : 0.0f;
  return 0.5;
}

// out [d] = the packed row; returns half · ‖out‖²
template <typename T>
MSACORE_INLINE double pack_row(const T* __restrict__ x, const double* __restrict__ scaled_shift, const Filter& f,
                               float* __restrict__ out) {
  double scale = f.scale;
  if (f.metric == kCosine) {
    double norm2 = 0;
#pragma omp simd reduction(+ : norm2)
    for (int64_t j = 0; j < f.d; ++j) norm2 += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    if (!is_safe(norm2)) return pack_rescaled_row(x, f.d, out);
    scale = 1 / std::sqrt(norm2);
#pragma omp simd
    for (int64_t j = 0; j < f.d; ++j) out[j] = static_cast<float>(static_cast<double>(x[j]) * scale);
    return 0.5;
  }
  // 16-bit and float32 values are shifted in float32, which rounds once, because the shift is a float32 number.
  using A = acc_t<T>;
  float norm2 = 0;
#pragma omp simd reduction(+ : norm2)
  for (int64_t j = 0; j < f.d; ++j) {
    out[j] = static_cast<float>(static_cast<A>(x[j]) * static_cast<A>(scale) - static_cast<A>(scaled_shift[j]));
    norm2 += out[j] * out[j];
  }
  return norm2;
}

// Each row picked out of the pool costs a cache miss, which hardware prefetchers avoid for neighbouring rows only.
template <typename T>
MSACORE_INLINE void prefetch(const T* row, int64_t d) {
  constexpr int64_t kCacheLine = 64;
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t offset = 0; offset < d * static_cast<int64_t>(sizeof(T)); offset += kCacheLine)
    __builtin_prefetch(bytes + offset);
}

// Packs `count` rows, given by number or (rows == nullptr) in order.
template <typename T>
MSACORE_SIMD void pack_rows(const T* pool, const int64_t* rows, int64_t count, const double* scaled_shift,
                            const Filter& f, float* out, double* half_norm) {
  const auto row = [&](int64_t i) { return pool + (rows ? rows[i] : i) * f.d; };
  for (int64_t i = 0; i < count; ++i) {
    if (i + 1 < count) prefetch(row(i + 1), f.d);
    half_norm[i] = pack_row(row(i), scaled_shift, f, out + i * f.d);
  }
}

// min_j base[j] - factor · dot[j]
MSACORE_SIMD inline float lowest(const float* __restrict__ dot, const float* __restrict__ base, int64_t n,
                                 float factor) {
  float low = INFINITY;
#pragma omp simd reduction(min : low)
  for (int64_t j = 0; j < n; ++j) {
    const float value = base[j] - factor * dot[j];
    low = value < low ? value : low;
  }
  return low;
}

// How many base[j] - factor · dot[j] are at most `limit`
MSACORE_SIMD inline int64_t count_within(const float* __restrict__ dot, const float* __restrict__ base, int64_t n,
                                         float factor, float limit) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t j = 0; j < n; ++j) count += base[j] - factor * dot[j] <= limit;
  return count;
}

}  // namespace msacore::kcenter::cpu
