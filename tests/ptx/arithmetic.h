// Instructions that only read and write registers.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "ptx.h"

namespace ptx {

inline float as_float(uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits)); }
inline double as_double(uint64_t bits) { return std::bit_cast<double>(bits); }
inline uint64_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline uint64_t bits_of(double x) { return std::bit_cast<uint64_t>(x); }

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

inline float half_value(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline uint16_t half_bits(double x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline float bfloat_value(uint16_t bits) { return as_float(uint64_t{bits} << 16); }
inline uint16_t bfloat_bits(float x) {
  if (std::isnan(x)) return 0x7fff;
  const auto u = static_cast<uint32_t>(bits_of(x));
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);  // to nearest, ties to even
}

inline double real_value(Type t, uint64_t bits) {
  switch (t) {
    case Type::F64:
      return as_double(bits);
    case Type::F32:
      return as_float(bits);
    case Type::F16:
      return half_value(static_cast<uint16_t>(bits));
    default:
      return bfloat_value(static_cast<uint16_t>(bits));
  }
}
inline uint64_t real_bits(Type t, double x) {
  switch (t) {
    case Type::F64:
      return bits_of(x);
    case Type::F32:
      return bits_of(static_cast<float>(x));
    case Type::F16:
      return half_bits(x);
    default:
      return bfloat_bits(static_cast<float>(x));
  }
}

// The low bits of a register that form an operand of type `t`: as they are, and as a signed number.
inline uint64_t low(Type t, uint64_t v) {
  const int bits = 8 * size_of(t);
  return bits == 64 ? v : v & ((uint64_t{1} << bits) - 1);
}
inline int64_t signed_low(Type t, uint64_t v) {
  const int unused = 64 - 8 * size_of(t);
  return static_cast<int64_t>(v << unused) >> unused;
}

template <typename In>
bool compare(const In& in, uint64_t left, uint64_t right) {
  const auto ordering = [&](auto a, auto b) {
    switch (static_cast<Compare>(in.variant)) {
      case Compare::Eq:
      case Compare::Equ:
        return a == b;
      case Compare::Ne:
      case Compare::Neu:
        return a != b;
      case Compare::Lt:
      case Compare::Ltu:
        return a < b;
      case Compare::Le:
      case Compare::Leu:
        return a <= b;
      case Compare::Gt:
      case Compare::Gtu:
        return a > b;
      case Compare::Ge:
      case Compare::Geu:
        return a >= b;
      case Compare::Num:
        return true;
      case Compare::NaN:
        return false;
    }
    return false;
  };
  if (!is_float(in.type)) {
    if (is_signed(in.type)) return ordering(signed_low(in.type, left), signed_low(in.type, right));
    return ordering(low(in.type, left), low(in.type, right));
  }
  double a = real_value(in.type, left), b = real_value(in.type, right);
  if (in.flush) a = flushed(static_cast<float>(a)), b = flushed(static_cast<float>(b));
  if (std::isnan(a) || std::isnan(b)) return in.variant >= int(Compare::Equ) && in.variant != int(Compare::Num);
  return ordering(a, b);
}

inline uint64_t to_integer(Type to, Rounding rounding, double x) {
  const int bits = 8 * size_of(to);
  if (std::isnan(x)) return bits == 64 ? uint64_t{1} << 63 : 0;
  switch (rounding) {
    case Rounding::NearestInt:
    case Rounding::Nearest:
      x = std::nearbyint(x);
      break;
    case Rounding::DownInt:
      x = std::floor(x);
      break;
    case Rounding::UpInt:
      x = std::ceil(x);
      break;
    default:
      x = std::trunc(x);
  }
  // Out of range: the nearest representable number.
  if (is_signed(to)) {
    const double limit = std::ldexp(1.0, bits - 1);
    if (x < -limit) return uint64_t{1} << (bits - 1);
    if (x >= limit) return (uint64_t{1} << (bits - 1)) - 1;
    return low(to, static_cast<uint64_t>(static_cast<int64_t>(x)));
  }
  if (x < 0) return 0;
  return x >= std::ldexp(1.0, bits) ? low(to, ~uint64_t{0}) : static_cast<uint64_t>(x);
}

template <typename In>
uint64_t convert(const In& in, uint64_t a, uint64_t b) {
  const Type to = in.type, from = in.second == Type::None ? in.type : in.second;
  const auto rounding = static_cast<Rounding>(in.variant);
  if (in.detail == 1) {  // tf32: 10 bits of mantissa, ties away from zero (rna) or to even (rn)
    auto u = static_cast<uint32_t>(a);
    if (std::isfinite(as_float(u))) u += rounding == Rounding::NearestAway ? 0x1000u : 0xfffu + ((u >> 13) & 1);
    return u & 0xffffe000u;
  }
  const bool directed = rounding == Rounding::Zero || rounding == Rounding::Down || rounding == Rounding::Up;
  if (directed && is_float(to)) fail("unsupported", std::string("rounding of `") + in.text + "`");
  if (in.detail == 2) return uint64_t{half_bits(as_float(a))} << 16 | half_bits(as_float(b));
  if (in.detail == 3) return uint64_t{bfloat_bits(as_float(a))} << 16 | bfloat_bits(as_float(b));
  if (is_float(from)) {
    double x = real_value(from, a);
    if (in.flush && from == Type::F32) x = flushed(static_cast<float>(x));
    if (!is_float(to)) return to_integer(to, rounding, x);
    switch (rounding) {
      case Rounding::NearestInt:
        x = std::nearbyint(x);
        break;
      case Rounding::ZeroInt:
        x = std::trunc(x);
        break;
      case Rounding::DownInt:
        x = std::floor(x);
        break;
      case Rounding::UpInt:
        x = std::ceil(x);
        break;
      default:
        break;
    }
    if (in.saturate) x = x > 0 ? std::min(x, 1.0) : 0;
    return real_bits(to, x);
  }
  if (is_signed(from)) {
    const int64_t x = signed_low(from, a);
    if (to == Type::F32) return bits_of(static_cast<float>(x));  // not through double: rounded once
    return is_float(to) ? real_bits(to, static_cast<double>(x)) : low(to, static_cast<uint64_t>(x));
  }
  const uint64_t x = low(from, a);
  if (to == Type::F32) return bits_of(static_cast<float>(x));
  return is_float(to) ? real_bits(to, static_cast<double>(x)) : low(to, x);
}

inline uint64_t permute_bytes(uint64_t bytes, uint32_t selectors) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = (selectors >> (4 * i)) & 15;
    uint32_t byte = (bytes >> (8 * (selector & 7))) & 0xff;
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign bit, repeated
    result |= byte << (8 * i);
  }
  return result;
}

inline uint64_t extract_bits(Type t, uint64_t x, uint32_t position, uint32_t length) {
  const uint32_t bits = 8 * size_of(t);
  if (length == 0) return 0;
  const uint64_t mask = length >= 64 ? ~uint64_t{0} : (uint64_t{1} << length) - 1;
  uint64_t result = position >= bits ? 0 : (low(t, x) >> position) & mask;
  if (is_signed(t) && (x >> std::min(position + length - 1, bits - 1)) & 1) {
    const uint32_t kept = position >= bits ? 0 : std::min(length, bits - position);
    if (kept < 64) result |= ~uint64_t{0} << kept;
  }
  return low(t, result);
}

inline uint64_t insert_bits(uint64_t field, uint64_t into, uint32_t position, uint32_t length) {
  if (position >= 64) return into;
  const uint64_t mask = (length >= 64 ? ~uint64_t{0} : (uint64_t{1} << length) - 1) << position;
  return (into & ~mask) | ((field << position) & mask);
}

// Applies `operation` in the instruction's floating type; 16-bit types are computed in double and rounded once.
template <typename In, typename Op>
uint64_t real(const In& in, uint64_t a, uint64_t b, uint64_t c, Op operation) {
  const auto op = [&](auto x, auto y, auto z) {
    const auto result = operation(x, y, z);
    if (!in.saturate) return result;
    return result > 0 ? std::min(result, decltype(result)(1)) : decltype(result)(0);  // NaN becomes 0
  };
  if (in.type == Type::F64) return bits_of(static_cast<double>(op(as_double(a), as_double(b), as_double(c))));
  if (in.type != Type::F32) {
    return real_bits(in.type, op(real_value(in.type, a), real_value(in.type, b), real_value(in.type, c)));
  }
  float x = as_float(a), y = as_float(b), z = as_float(c);
  if (in.flush) x = flushed(x), y = flushed(y), z = flushed(z);
  const float result = op(x, y, z);
  return bits_of(in.flush ? flushed(result) : result);
}

// The result of an instruction with up to four operands, which block.cpp stores. `In` is Instruction, or what steps.cpp
// knows of one at compile time.
template <typename In>
uint64_t arithmetic(const In& in, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  const Type t = in.type;
  const int bits = 8 * size_of(t);
  const auto integer = [&](auto op) {
    return is_signed(t) ? low(t, uint64_t(op(signed_low(t, a), signed_low(t, b)))) : low(t, op(low(t, a), low(t, b)));
  };
  switch (in.op) {
    case Opcode::Mov:
      return t == Type::Pred ? a != 0 : low(t, a);
    case Opcode::Cvt:
      return convert(in, a, b);
    case Opcode::Selp:
      return low(t, c ? a : b);
    case Opcode::Add:
      if (is_float(t)) return real(in, a, b, 0, [](auto x, auto y, auto) { return x + y; });
      return low(t, a + b);
    case Opcode::Sub:
      if (is_float(t)) return real(in, a, b, 0, [](auto x, auto y, auto) { return x - y; });
      return low(t, a - b);
    case Opcode::Mul:
      if (is_float(t)) return real(in, a, b, 0, [](auto x, auto y, auto) { return x * y; });
      return low(t, a * b);
    case Opcode::Fma:
      return real(in, a, b, c, [](auto x, auto y, auto z) { return std::fma(x, y, z); });
    case Opcode::Mad:
      if (is_float(t)) return real(in, a, b, c, [](auto x, auto y, auto z) { return std::fma(x, y, z); });
      return low(t, a * b + c);
    case Opcode::MulWide:
    case Opcode::MadWide: {
      const uint64_t product = is_signed(t) ? uint64_t(signed_low(t, a) * signed_low(t, b)) : low(t, a) * low(t, b);
      const uint64_t sum = in.op == Opcode::MadWide ? product + c : product;
      return bits == 32 ? sum : sum & 0xffffffff;
    }
    case Opcode::MulHi:
      if (is_signed(t)) return low(t, uint64_t((static_cast<__int128>(signed_low(t, a)) * signed_low(t, b)) >> bits));
      return low(t, uint64_t((static_cast<unsigned __int128>(low(t, a)) * low(t, b)) >> bits));
    case Opcode::Div:
      if (is_float(t)) return real(in, a, b, 0, [](auto x, auto y, auto) { return x / y; });
      if (low(t, b) == 0) return low(t, ~uint64_t{0});
      if (is_signed(t) && signed_low(t, b) == -1) return low(t, 0 - a);  // the smallest number cannot be negated
      return integer([](auto x, auto y) { return x / y; });
    case Opcode::Rem:
      if (low(t, b) == 0 || (is_signed(t) && signed_low(t, b) == -1)) return low(t, b) == 0 ? low(t, a) : 0;
      return integer([](auto x, auto y) { return x % y; });
    case Opcode::Min:
    case Opcode::Max: {
      const bool least = in.op == Opcode::Min;
      if (!is_float(t)) return integer([&](auto x, auto y) { return (x < y) == least ? x : y; });
      return real(in, a, b, 0, [&](auto x, auto y, auto) {
        if (in.variant && (std::isnan(x) || std::isnan(y))) return x + y;
        return least ? std::fmin(x, y) : std::fmax(x, y);
      });
    }
    case Opcode::Neg:
      return is_float(t) ? a ^ (uint64_t{1} << (bits - 1)) : low(t, 0 - a);
    case Opcode::Abs:
      if (is_float(t)) return low(t, a) & ~(uint64_t{1} << (bits - 1));
      return low(t, uint64_t(signed_low(t, a) < 0 ? -signed_low(t, a) : signed_low(t, a)));
    case Opcode::Copysign:
      return (low(t, b) & ~(uint64_t{1} << (bits - 1))) | (a & (uint64_t{1} << (bits - 1)));
    case Opcode::And:
      return low(t, a & b);
    case Opcode::Or:
      return low(t, a | b);
    case Opcode::Xor:
      return low(t, a ^ b);
    case Opcode::Not:
      return t == Type::Pred ? !a : low(t, ~a);
    case Opcode::Shl:
      return uint32_t(b) >= unsigned(bits) ? 0 : low(t, a << uint32_t(b));
    case Opcode::Shr: {
      const uint32_t by = std::min<uint32_t>(uint32_t(b), bits);
      if (is_signed(t)) return low(t, uint64_t(signed_low(t, a) >> std::min<uint32_t>(by, bits - 1)));
      return by == unsigned(bits) ? 0 : low(t, a) >> by;
    }
    case Opcode::Shf: {  // detail: .wrap; variant: to the right
      const uint32_t by = in.detail ? uint32_t(c) & 31 : std::min(uint32_t(c), 32u);
      const uint64_t both = b << 32 | (a & 0xffffffff);
      return uint32_t(in.variant ? both >> by : (both << by) >> 32);
    }
    case Opcode::Prmt:
      return permute_bytes(b << 32 | (a & 0xffffffff), uint32_t(c));
    case Opcode::Bfe:
      return extract_bits(t, a, b & 255, c & 255);
    case Opcode::Bfi:
      return low(t, insert_bits(a, b, c & 255, d & 255));
    case Opcode::Popc:
      return std::popcount(low(t, a));
    case Opcode::Clz:
      return std::countl_zero(low(t, a)) - (64 - bits);
    case Opcode::Brev: {
      uint64_t reversed = 0;
      for (int i = 0; i < bits; ++i) reversed |= ((a >> i) & 1) << (bits - 1 - i);
      return reversed;
    }
    case Opcode::Bfind: {  // variant: .shiftamt
      const uint64_t x = is_signed(t) && signed_low(t, a) < 0 ? low(t, ~a) : low(t, a);
      if (x == 0) return 0xffffffff;
      const int position = 63 - std::countl_zero(x);
      return in.variant ? bits - 1 - position : position;
    }
    case Opcode::Lop3: {
      uint32_t result = 0;
      for (int i = 0; i < 32; ++i) {
        const uint32_t entry = ((a >> i) & 1) << 2 | ((b >> i) & 1) << 1 | ((c >> i) & 1);
        result |= ((d >> entry) & 1) << i;
      }
      return result;
    }
    // The hardware's approximations are off by an ulp or two; these are rounded correctly or nearly so.
    case Opcode::Ex2:
      return real(in, a, 0, 0, [](auto x, auto, auto) { return std::exp2(x); });
    case Opcode::Lg2:
      return real(in, a, 0, 0, [](auto x, auto, auto) { return std::log2(x); });
    case Opcode::Sin:
      return real(in, a, 0, 0, [](auto x, auto, auto) { return std::sin(x); });
    case Opcode::Cos:
      return real(in, a, 0, 0, [](auto x, auto, auto) { return std::cos(x); });
    case Opcode::Sqrt:
      return real(in, a, 0, 0, [](auto x, auto, auto) { return std::sqrt(x); });
    case Opcode::Rcp:
    case Opcode::Rsqrt: {
      const bool root = in.op == Opcode::Rsqrt;
      const uint64_t result = real(in, a, 0, 0, [&](auto x, auto, auto) { return 1 / (root ? std::sqrt(x) : x); });
      // For a double the approximation has only the upper half; code that nvcc adds refines it.
      return t == Type::F64 && in.approximate ? result & 0xffffffff00000000ull : result;
    }
    default:
      fail("unsupported", std::string("`") + in.text + "`");
  }
}

}  // namespace ptx
