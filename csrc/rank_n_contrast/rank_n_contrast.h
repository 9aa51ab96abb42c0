// Rank-N-Contrast: what the operator accepts, on every device.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "core/optional.h"
#include "core/dtype.h"

namespace msacore::rank_n_contrast {
using msacore::contiguous;

struct Inputs {
  Tensor embeddings, targets;
  OptionalTensor mask;
};

struct Sizes {
  int64_t samples, width;
};

inline Sizes check_inputs(const char* op, const Inputs& in, double temperature) {
  const auto& [embeddings, targets, mask] = in;
  check_floating(embeddings, op, "embeddings");
  check_shape(embeddings, op, "embeddings", {-1, -1}, "[N, d]");
  check_floating(targets, op, "targets");
  check_shape(targets, op, "targets", {embeddings.size(0)}, "[N]");
  check_device(targets, op, "targets", embeddings);
  if (mask) {
    check_dtype(*mask, op, "mask", ScalarType::Bool);
    check_shape(*mask, op, "mask", {embeddings.size(0)}, "[N]");
    check_device(*mask, op, "mask", embeddings);
  }
  check_temperature(op, "temperature", temperature);
  return {embeddings.size(0), embeddings.size(1)};
}

inline void check_gradient(const char* op, const Inputs& in, const Tensor& grad_out) {
  check_shape(grad_out, op, "grad_out", {}, "[]");
  check_dtype(grad_out, op, "grad_out", acc_dtype(in.embeddings.scalar_type()));
}

inline Inputs contiguous(const Inputs& in) {
  return {torch::stable::contiguous(in.embeddings), torch::stable::contiguous(in.targets), contiguous(in.mask)};
}

}  // namespace msacore::rank_n_contrast
