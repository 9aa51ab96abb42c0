// Element types of tensors, and the type in which their sums are kept. Kernels include this file, so it includes no
// torch headers except torch/headeronly.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace msacore {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// Type in which sums are kept: 16-bit inputs accumulate in float32.
template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using acc_t = typename AccumulateType<T>::type;

template <typename T>
constexpr bool is_16_bit = sizeof(T) == 2;

}  // namespace msacore
