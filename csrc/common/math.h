// Elementary functions that the compiler can vectorise; the C library's are one call per element.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace msacore {

template <typename To, typename From>
MSACORE_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// e^x within 2 units in the last place where the result is a normal number, 0 below, +inf above; NaN stays NaN.
// x = k ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 · 2^(mantissa bits) rounds to an integer and leaves it in the low
// bits.
MSACORE_INLINE float exp_of(float x) {
  const float clamped = x < -87.3f ? -87.3f : (x > 88.3f ? 88.3f : x);
  const float shifted = clamped * 1.44269504f + 12582912.f;
  const float k = shifted - 12582912.f;
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.f;
  const uint32_t scale = (bits_as<uint32_t>(shifted) + 127u) << 23;
  const float result = p * bits_as<float>(scale);
  return x < -87.3f ? 0.f : (x > 88.3f ? x * 3e38f : result);
}

MSACORE_INLINE double exp_of(double x) {
  const double clamped = x < -708. ? -708. : (x > 709. ? 709. : x);
  const double shifted = clamped * 1.4426950408889634 + 6755399441055744.;
  const double k = shifted - 6755399441055744.;
  const double r = (clamped - k * 6.93145751953125e-1) - k * 1.42860682030941723212e-6;
  double p = 1.6059043836821613e-10;  // Taylor: 1/13! … 1/2!; |r| <= 0.3466 leaves 4e-18
  p = p * r + 2.0876756987868099e-9;
  p = p * r + 2.5052108385441719e-8;
  p = p * r + 2.7557319223985891e-7;
  p = p * r + 2.7557319223985893e-6;
  p = p * r + 2.4801587301587302e-5;
  p = p * r + 1.9841269841269841e-4;
  p = p * r + 1.3888888888888889e-3;
  p = p * r + 8.3333333333333333e-3;
  p = p * r + 4.1666666666666667e-2;
  p = p * r + 1.6666666666666667e-1;
  p = p * r + 0.5;
  p = (p * r) * r + r + 1.;
  const uint64_t scale = (bits_as<uint64_t>(shifted) + 1023u) << 52;
  const double result = p * bits_as<double>(scale);
  return x < -708. ? 0. : (x > 709. ? x * 1e308 : result);
}

}  // namespace msacore
