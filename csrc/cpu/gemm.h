// Matrix products through torch (oneMKL behind it on x86), written into scratch that the caller owns.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "core/check.h"

namespace msacore::cpu {

// out = a · b. The out= form allocates nothing and is left alone by autocast, which would turn a float32 `matmul` into
// a bfloat16 one in the middle of a kernel.
inline void mm_out(Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  out = torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace msacore::cpu
