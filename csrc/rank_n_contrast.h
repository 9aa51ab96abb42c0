// Rank-N-Contrast: what the operator accepts, on every device.
#pragma once
#include <optional>

#include "common/check.h"

namespace msacore::rank_n_contrast {

struct Sizes {
  int64_t samples, width;
};

inline Sizes check_inputs(const char* op, const Tensor& embeddings, const Tensor& targets,
                          const std::optional<Tensor>& mask, double temperature) {
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
  check(temperature > 0, op, "expected `temperature` to be greater than 0, got ", temperature);
  return {embeddings.size(0), embeddings.size(1)};
}

}  // namespace msacore::rank_n_contrast
