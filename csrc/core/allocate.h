// Memory of results and of work on the way to them.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "core/check.h"

namespace msacore {

// An uninitialised tensor on the device of `like`. It goes through torch's dispatcher, which fills it with NaN under
// torch.use_deterministic_algorithms: that is how tests see an element that no kernel writes. The allocation of
// libtorch's C interface is faster by some microseconds and leaves the memory as it is.
inline Tensor empty_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor empty_tensor(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes);
}

}  // namespace msacore
