// Arguments that may be absent, and argument rules that several operators share.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>

#include "core/check.h"

namespace msacore {

using OptionalTensor = std::optional<Tensor>;

inline void check_temperature(const char* op, const char* name, double value) {
  check(value > 0 && std::isfinite(value), op, "expected `", name, "` to be positive and finite, got ", value);
}

// Checks a tensor with one entry per row, such as a mask or labels.
inline void check_rows(const char* op, const OptionalTensor& t, const char* name, ScalarType dtype, int64_t rows,
                       const char* meaning, const Tensor& like) {
  if (!t) return;
  check_dtype(*t, op, name, dtype);
  check_shape(*t, op, name, {rows}, meaning);
  check_device(*t, op, name, like);
}

inline void check_steps(const char* op, int64_t steps, double alpha) {
  check(steps >= 0, op, "expected `steps` to be at least 0, got ", steps);
  check(alpha >= 0 && alpha <= 1, op, "expected `alpha` in [0, 1], got ", alpha);
}

// `t` itself where its memory is contiguous; torch's own function returns it too, but looks the operator up by name.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(as_contiguous(*t)) : std::nullopt;
}

// Null only where the argument was not given: an empty tensor that was given may have a null data pointer.
template <typename V>
const V* data_or_null(const OptionalTensor& t) {
  static const V no_entry{};
  if (!t) return nullptr;
  const V* data = t->const_data_ptr<V>();
  return data ? data : &no_entry;
}

// Memory that a forward pass fills and the backward pass reads; null where nothing is kept.
template <typename V>
V* kept_data(const Tensor& kept) {
  return kept.numel() ? const_cast<V*>(kept.const_data_ptr<V>()) : nullptr;
}

}  // namespace msacore
