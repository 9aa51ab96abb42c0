// Integers rounded to multiples.
#pragma once
#include <type_traits>

// Kernels call these functions too.
#ifdef __CUDACC__
#define MSACORE_HOST_DEVICE __host__ __device__
#else
#define MSACORE_HOST_DEVICE
#endif

namespace msacore {

// Neither argument is negative, and `divisor` is not zero.
template <typename T, typename U>
MSACORE_HOST_DEVICE constexpr std::common_type_t<T, U> ceil_div(T value, U divisor) {
  return (value + divisor - 1) / divisor;
}
template <typename T, typename U>
MSACORE_HOST_DEVICE constexpr std::common_type_t<T, U> round_up(T value, U multiple) {
  return ceil_div(value, multiple) * multiple;
}

}  // namespace msacore
