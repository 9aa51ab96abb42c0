// Products on tensor cores, and how they are added.
#pragma once

#include "arithmetic.h"

namespace ptx {

enum class MmaModel { Exact, A100, H100 };

// The exponent by which an addend is aligned. Subnormal numbers have that of the smallest normal number of their type.
inline int exponent_of(double x, int least) { return std::max(std::ilogb(x), least); }

// c + Σ a·b over `count` products, as a tensor core is believed to compute it: every addend is cut off at `bits` bits
// below the largest exponent (a product's exponent is the sum of its factors' exponents), what is left is added
// exactly, and the sum is cut off to float32. See README.md.
inline float truncated_sum(const double* a, const double* b, int count, float c, int bits, int least) {
  constexpr int kNone = -100000;
  double plain = c;
  int top = c == 0 ? kNone : exponent_of(c, -126);
  for (int i = 0; i < count; ++i) {
    plain += a[i] * b[i];
    if (a[i] * b[i] != 0) top = std::max(top, exponent_of(a[i], least) + exponent_of(b[i], least));
  }
  if (!std::isfinite(plain) || top == kNone) return static_cast<float>(plain);
  const double unit = std::ldexp(1.0, top - bits);
  double sum = std::trunc(c / unit);
  for (int i = 0; i < count; ++i) sum += std::trunc(a[i] * b[i] / unit);
  sum *= unit;
  if (sum == 0) return 0;
  const double last_place = std::ldexp(1.0, std::max(std::ilogb(sum) - 23, -149));
  return static_cast<float>(std::trunc(sum / last_place) * last_place);
}

// One element of C += A · B: a sum of `k` products, each exact in double.
inline float tensor_core_sum(MmaModel model, const double* a, const double* b, int k, float c, int least) {
  if (model == MmaModel::Exact) {
    double sum = c;
    for (int i = 0; i < k; ++i) sum += a[i] * b[i];
    return static_cast<float>(sum);
  }
  if (model == MmaModel::H100) return truncated_sum(a, b, k, c, 25, least);
  c = truncated_sum(a, b, k / 2, c, 24, least);
  return truncated_sum(a + k / 2, b + k / 2, k / 2, c, 24, least);
}

// Where value v of a lane's fragment lies: A [16, k] as (row, k), B [8, k] as (column, k), C [16, 8] as (row, column).
// Every element was checked once against the layouts that CuTe gives for the same instructions: no difference.
struct Place {
  int row, column;
};
inline Place place_of_a(int k, int lane, int v) {
  if (k == 16) return {lane / 4 + 8 * (v / 2 % 2), 2 * (lane % 4) + v % 2 + 8 * (v / 4)};
  return {lane / 4 + 8 * (v % 2), lane % 4 + 4 * (v / 2)};
}
inline Place place_of_b(int k, int lane, int v) {
  if (k == 16) return {lane / 4, 2 * (lane % 4) + v % 2 + 8 * (v / 2)};
  return {lane / 4, lane % 4 + 4 * v};
}
inline Place place_of_c(int lane, int v) { return {lane / 4 + 8 * (v / 2), 2 * (lane % 4) + v % 2}; }

// `registers[lane]` are those of the warp's threads.
inline void multiply_matrices(const Instruction& in, MmaModel model, uint64_t* const* registers) {
  const int k = in.variant, per_register = k == 16 ? 2 : 1;
  const int least = in.detail == 0 ? -14 : -126;  // exponent of the type's least normal number
  const auto value = [&](const Operand& o, int lane, int v) -> double {
    const uint64_t bits = registers[lane][o.regs[v / per_register]];
    if (in.detail == 2) return as_float(bits & 0xffffe000u);  // the hardware ignores the low 13 bits of a tf32
    const auto half = static_cast<uint16_t>(bits >> (16 * (v % 2)));
    return in.detail == 1 ? bfloat_value(half) : half_value(half);
  };
  double a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < k / 2; ++v) {
      const Place p = place_of_a(k, lane, v);
      a[p.row][p.column] = value(in.o[1], lane, v);
    }
    for (int v = 0; v < k / 4; ++v) {
      const Place p = place_of_b(k, lane, v);
      b[p.row][p.column] = value(in.o[2], lane, v);
    }
  }
  uint64_t sums[32][4];  // all are computed before any is written: the registers of C and D may be the same
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < 4; ++v) {
      const Place p = place_of_c(lane, v);
      const float c = as_float(registers[lane][in.o[3].regs[v]]);
      sums[lane][v] = bits_of(tensor_core_sum(model, a[p.row], b[p.column], k, c, least));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < 4; ++v) registers[lane][in.o[0].regs[v]] = sums[lane][v];
  }
}

}  // namespace ptx
