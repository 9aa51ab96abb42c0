// InfoNCE: what the operator accepts, on every device.
#pragma once
#include <cmath>
#include <optional>

#include "common/check.h"

namespace msacore::contrastive {

using OptionalTensor = std::optional<Tensor>;

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

inline void check_temperature(const char* op, const char* name, double value) {
  check(value > 0 && std::isfinite(value), op, "expected `", name, "` to be positive and finite, got ", value);
}

inline void check_rows(const char* op, const OptionalTensor& t, const char* name, ScalarType dtype, int64_t rows,
                       const char* meaning, const Tensor& like) {
  if (!t) return;
  check_dtype(*t, op, name, dtype);
  check_shape(*t, op, name, {rows}, meaning);
  check_device(*t, op, name, like);
}

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

}  // namespace msacore::contrastive
