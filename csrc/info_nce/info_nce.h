// InfoNCE: what the operator accepts, on every device.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "core/optional.h"

namespace msacore::info_nce {
using msacore::contiguous;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

struct InfoNceInputs {
  Tensor anchors;
  OptionalTensor candidates;  // absent: the anchors themselves
  OptionalTensor learned_temperature, anchor_labels, candidate_labels, weights, anchor_mask, candidate_mask;
};

struct InfoNceOptions {
  double temperature;
  bool symmetric, exclude_self;
  int64_t reduction;
};

struct InfoNceSizes {
  int64_t anchors, candidates, width;
};

inline InfoNceSizes check_inputs(const char* op, const InfoNceInputs& in, const InfoNceOptions& options) {
  const Tensor& anchors = in.anchors;
  check_floating(anchors, op, "anchors");
  check_shape(anchors, op, "anchors", {-1, -1}, "[N, d]");
  const int64_t n = anchors.size(0), d = anchors.size(1);
  int64_t m = n;
  check(!in.weights || !in.anchor_labels, op, "expected `labels` or `weights`, got both");
  check(in.anchor_labels.has_value() == in.candidate_labels.has_value(), op,
        "expected `labels` for anchors and candidates, got one of the two");
  if (in.candidates) {
    check_dtype(*in.candidates, op, "candidates", anchors.scalar_type());
    check_shape(*in.candidates, op, "candidates", {-1, d}, "[N', d]");
    check_device(*in.candidates, op, "candidates", anchors);
    m = in.candidates->size(0);
  }
  if (in.learned_temperature) {
    check_floating(*in.learned_temperature, op, "temperature");
    check_shape(*in.learned_temperature, op, "temperature", {}, "[] (0-d)");
    check_device(*in.learned_temperature, op, "temperature", anchors);
  } else {
    check_temperature(op, "temperature", options.temperature);
  }
  check_rows(op, in.anchor_labels, "labels[0]", ScalarType::Long, n, "[N]", anchors);
  check_rows(op, in.candidate_labels, "labels[1]", ScalarType::Long, m, "[N']", anchors);
  check_rows(op, in.anchor_mask, "anchor_mask", ScalarType::Bool, n, "[N]", anchors);
  check_rows(op, in.candidate_mask, "candidate_mask", ScalarType::Bool, m, "[N']", anchors);
  if (in.weights) {
    check_dtype(*in.weights, op, "weights", anchors.scalar_type());
    check_shape(*in.weights, op, "weights", {n, m}, "[N, N']");
    check_device(*in.weights, op, "weights", anchors);
  }
  if (!in.weights && !in.anchor_labels)
    check(n == m, op, "expected `candidates` to have as many rows as `anchors` (", n,
          ") when neither `labels` nor `weights` say which are positive, got ", m);
  check(options.reduction >= kNone && options.reduction <= kSum, op,
        "expected `reduction` to be \"none\", \"mean\" or \"sum\", got code ", options.reduction);
  if (options.symmetric && options.reduction == kNone)
    check(n == m, op, "expected `candidates` to have as many rows as `anchors` (", n,
          ") with `symmetric` and `reduction` \"none\", got ", m);
  return {n, m, d};
}

// The gradient of the loss, and what the forward pass saved.
inline void check_saved(const char* op, const InfoNceSizes& s, const InfoNceOptions& options, ScalarType dtype,
                        const Tensor& grad_out, const Tensor& anchor_stats, const Tensor& candidate_stats) {
  check_dtype(grad_out, op, "grad_out", dtype);
  if (options.reduction == kNone)
    check_shape(grad_out, op, "grad_out", {s.anchors}, "[N]");
  else
    check_shape(grad_out, op, "grad_out", {}, "[]");
  check_dtype(anchor_stats, op, "anchor_stats", dtype);
  check_shape(anchor_stats, op, "anchor_stats", {3, s.anchors}, "[3, N]");
  check_dtype(candidate_stats, op, "candidate_stats", dtype);
  check_shape(candidate_stats, op, "candidate_stats", {3, options.symmetric ? s.candidates : 0}, "[3, N'] or [3, 0]");
}

inline InfoNceInputs contiguous(const InfoNceInputs& in) {
  return {torch::stable::contiguous(in.anchors),
          contiguous(in.candidates),
          contiguous(in.learned_temperature),
          contiguous(in.anchor_labels),
          contiguous(in.candidate_labels),
          contiguous(in.weights),
          contiguous(in.anchor_mask),
          contiguous(in.candidate_mask)};
}

}  // namespace msacore::info_nce
