// Memory of results and of work on the way to them.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <vector>

#include "core/check.h"

namespace msacore {

// An uninitialised tensor on the device of `like`. torch::stable::new_empty looks its operator up by name, which takes
// several times as long.
inline Tensor empty_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), static_cast<int32_t>(dtype), device_type, device_index, &result));
  return Tensor(result);
}

inline Tensor empty_tensor(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty_tensor(like, sizes, like.scalar_type());
}

}  // namespace msacore
