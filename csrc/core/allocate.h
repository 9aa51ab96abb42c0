// Allocation of results and of scratch memory.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "core/check.h"

namespace msacore {

// An uninitialised tensor on the device of `like`. The allocation goes through torch's dispatcher, which fills it with
// NaN under torch.use_deterministic_algorithms; tests rely on that to detect elements that no kernel writes. The
// allocation function of libtorch's C interface is a few microseconds faster but leaves the memory as it is.
inline Tensor empty_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor empty_tensor(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes);
}

}  // namespace msacore
