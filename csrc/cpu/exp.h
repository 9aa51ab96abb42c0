// Elementary functions that the compiler can vectorise; the C library's need one call per element.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace msacore::cpu {

template <typename To, typename From>
MSACORE_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// 2^(k + rest), where `shifted` is 1.5 · 2^(mantissa bits) + k, so that its low bits hold the integer k, and rest is in
// [-1/2, 1/2]: 2^k from the exponent bits, times a polynomial in rest (Chebyshev interpolation, relative error 2.5e-9).
MSACORE_INLINE float power_of_two(float shifted, float rest) {
  float p = 1.54614446985691e-4f;
  p = p * rest + 1.34004281776158e-3f;
  p = p * rest + 9.61805667852464e-3f;
  p = p * rest + 5.55032722667030e-2f;
  p = p * rest + 2.40226509222888e-1f;
  p = p * rest + 6.93147206702833e-1f;
  p = p * rest + 1.0f;
  const uint32_t power = (bits_as<uint32_t>(shifted) + 127u) << 23;
  return p * bits_as<float>(power);
}

// The same in double precision; polynomial error 4e-18.
MSACORE_INLINE double power_of_two(double shifted, double rest) {
  double p = 4.45581790833606449e-10;
  p = p * rest + 7.07419429728852101e-9;
  p = p * rest + 1.01780570877339411e-7;
  p = p * rest + 1.32154325359123762e-6;
  p = p * rest + 1.52527338415567726e-5;
  p = p * rest + 1.54035304637243542e-4;
  p = p * rest + 1.33335581464064707e-3;
  p = p * rest + 9.61812910758725667e-3;
  p = p * rest + 5.55041086648216270e-2;
  p = p * rest + 2.40226506959101596e-1;
  p = p * rest + 6.93147180559945309e-1;
  p = p * rest + 1.0;
  const uint64_t power = (bits_as<uint64_t>(shifted) + 1023u) << 52;
  return p * bits_as<double>(power);
}

constexpr float kRoundFloat = 12582912.f;            // 1.5 · 2^23
constexpr double kRoundDouble = 6755399441055744.0;  // 1.5 · 2^52

// 2^x to about 1 ulp. 0 below the smallest normal number: at -127 the exponent bits are those of 0.0, so one
// comparison, which compiles to a maximum, is enough. NaN stays NaN. Not for x >= 127.5.
MSACORE_INLINE float exp2_of(float x) {
  const float kept = x < -127.0f ? -127.0f : x;
  const float shifted = kept + kRoundFloat;
  return power_of_two(shifted, kept - (shifted - kRoundFloat));
}

// The same in double precision. Not for x >= 1023.5.
MSACORE_INLINE double exp2_of(double x) {
  const double kept = x < -1023.0 ? -1023.0 : x;
  const double shifted = kept + kRoundDouble;
  return power_of_two(shifted, kept - (shifted - kRoundDouble));
}

// e^x within 2 units in the last place where the result is a normal number, 0 below, +inf above; NaN stays NaN.
// x = k ln 2 + r with |r| <= ln 2 / 2; ln 2 is split into two parts, the first short enough for an exact product.
MSACORE_INLINE float exp_of(float x) {
  const float clamped = x < -87.3f ? -87.3f : (x > 88.3f ? 88.3f : x);
  const float shifted = clamped * 1.44269504f + kRoundFloat;
  const float k = shifted - kRoundFloat;
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  const float result = power_of_two(shifted, r * 1.44269504f);
  return x < -87.3f ? 0.f : (x > 88.3f ? x * 3e38f : result);
}

MSACORE_INLINE double exp_of(double x) {
  const double clamped = x < -708. ? -708. : (x > 709. ? 709. : x);
  const double shifted = clamped * 1.4426950408889634 + kRoundDouble;
  const double k = shifted - kRoundDouble;
  const double r = (clamped - k * 6.93145751953125e-1) - k * 1.42860682030941723212e-6;
  const double result = power_of_two(shifted, r * 1.4426950408889634);
  return x < -708. ? 0. : (x > 709. ? x * 1e308 : result);
}

}  // namespace msacore::cpu
