// Whole numbers rounded to multiples.
#pragma once

namespace msacore {

// Both arguments are positive or zero, `divisor` is not zero.
template <typename T>
constexpr T ceil_div(T value, T divisor) {
  return (value + divisor - 1) / divisor;
}
template <typename T>
constexpr T round_up(T value, T multiple) {
  return ceil_div(value, multiple) * multiple;
}

}  // namespace msacore
