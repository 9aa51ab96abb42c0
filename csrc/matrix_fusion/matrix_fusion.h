// Matrix fusion: what the operators accept, on every device.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>
#include <vector>

#include "core/allocate.h"
#include "core/optional.h"

namespace msacore::matrix_fusion {

enum class Activation : int64_t { kRelu = 0, kGelu = 1, kIdentity = 2 };

struct Inputs {
  const std::vector<Tensor>& features;  // M times [B, L, k]
  const Tensor &row_weight, &row_bias, &pair_weight, &pair_bias;
  const OptionalTensor &mask, &available;
};

struct Sizes {
  int64_t batch, modalities, length, features, width, rows, pairs, channels;  // B, M, L, k, k', q, P, C
  bool augment;
  Activation activation;
};

// Pairs are ordered (0, 1), (0, 2), …, (1, 2), …
inline int64_t pair_index(int64_t m, int64_t n, int64_t modalities) {
  return m * modalities - m * (m + 1) / 2 + n - m - 1;
}

inline Sizes check_inputs(const char* op, const Inputs& in, bool augment, int64_t activation) {
  const int64_t modalities = static_cast<int64_t>(in.features.size());
  check(modalities >= 2, op, "expected `features` to hold at least 2 modalities, got ", modalities);
  check(activation >= 0 && activation <= 2, op, "expected `activation` to be 0, 1 or 2, got ", activation);
  const Tensor& first = in.features[0];
  check_floating(first, op, "features[0]");
  check_shape(first, op, "features[0]", {-1, -1, -1}, "[B, L, k]");
  const int64_t batch = first.size(0), length = first.size(1), width = first.size(2) + (augment ? 1 : 0);
  const int64_t pairs = modalities * (modalities - 1) / 2;
  const auto check_one = [&](const Tensor& t, const std::string& name, std::initializer_list<int64_t> shape,
                             const char* meaning, ScalarType dtype) {
    check_dtype(t, op, name, dtype);
    check_shape(t, op, name, shape, meaning);
    check_device(t, op, name, first);
  };
  const ScalarType dtype = first.scalar_type();
  for (int64_t m = 1; m < modalities; ++m)
    check_one(in.features[m], "features[" + std::to_string(m) + "]", {batch, length, first.size(2)}, "[B, L, k]",
              dtype);
  check_one(in.row_weight, "row_weight", {-1, width}, augment ? "[q, k + 1]" : "[q, k]", dtype);
  const int64_t rows = in.row_weight.size(0);
  check_one(in.row_bias, "row_bias", {rows}, "[q]", dtype);
  check_one(in.pair_weight, "pair_weight", {-1, pairs}, "[C, P]", dtype);
  const int64_t channels = in.pair_weight.size(0);
  check_one(in.pair_bias, "pair_bias", {channels}, "[C]", dtype);
  if (in.mask) check_one(*in.mask, "mask", {batch, length}, "[B, L]", ScalarType::Bool);
  if (in.available) check_one(*in.available, "available", {batch, modalities}, "[B, M]", ScalarType::Bool);
  return {batch, modalities, length,   first.size(2), width,
          rows,  pairs,      channels, augment,       static_cast<Activation>(activation)};
}

inline void check_grads(const char* op, const Tensor& grad_fused, const Tensor& grad_pairs, const Sizes& s,
                        const Tensor& like) {
  check_dtype(grad_fused, op, "grad_fused", like.scalar_type());
  check_shape(grad_fused, op, "grad_fused", {s.batch, s.channels, s.rows}, "[B, C, q]");
  check_device(grad_fused, op, "grad_fused", like);
  check_dtype(grad_pairs, op, "grad_pairs", like.scalar_type());
  check_shape(grad_pairs, op, "grad_pairs", {s.batch, s.pairs, s.rows}, "[B, P, q]");
  check_device(grad_pairs, op, "grad_pairs", like);
}

// What the gradient operator returns, before it is computed.
struct GradTensors {
  std::vector<Tensor> features;
  Tensor row_weight, row_bias, pair_weight, pair_bias;

  GradTensors(const Sizes& s, const Tensor& like)
      : row_weight(empty_tensor(like, {s.rows, s.width})),
        row_bias(empty_tensor(like, {s.rows})),
        pair_weight(empty_tensor(like, {s.channels, s.pairs})),
        pair_bias(empty_tensor(like, {s.channels})) {
    for (int64_t m = 0; m < s.modalities; ++m) features.push_back(empty_tensor(like, {s.batch, s.length, s.features}));
  }

  std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> in_order() const {
    return {features, row_weight, row_bias, pair_weight, pair_bias};
  }
};

// The operators of a device: `forward` and `backward` get arguments that were checked, and fill the outputs; `forward`
// is called with at least one sample. Gradients of outputs are contiguous.
template <void (*forward)(const char* op, const Inputs&, const Sizes&, Tensor& fused, Tensor& pairs),
          void (*backward)(const char* op, const Inputs&, const Sizes&, const Tensor& grad_fused,
                           const Tensor& grad_pairs, GradTensors&)>
struct MatrixOperators {
  static std::tuple<Tensor, Tensor> matrix_fusion(const std::vector<Tensor>& features, const Tensor& row_weight,
                                                  const Tensor& row_bias, const Tensor& pair_weight,
                                                  const Tensor& pair_bias, const OptionalTensor& mask,
                                                  const OptionalTensor& available, bool augment, int64_t activation) {
    constexpr const char* op = "matrix_fusion";
    const Inputs in{features, row_weight, row_bias, pair_weight, pair_bias, mask, available};
    const Sizes s = check_inputs(op, in, augment, activation);
    Tensor fused = empty_tensor(features[0], {s.batch, s.channels, s.rows});
    Tensor pairs = empty_tensor(features[0], {s.batch, s.pairs, s.rows});
    if (s.batch > 0) forward(op, in, s, fused, pairs);
    return {fused, pairs};
  }

  static std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> matrix_fusion_backward(
      const Tensor& grad_fused, const Tensor& grad_pairs, const std::vector<Tensor>& features, const Tensor& row_weight,
      const Tensor& row_bias, const Tensor& pair_weight, const Tensor& pair_bias, const OptionalTensor& mask,
      const OptionalTensor& available, bool augment, int64_t activation) {
    constexpr const char* op = "matrix_fusion_backward";
    const Inputs in{features, row_weight, row_bias, pair_weight, pair_bias, mask, available};
    const Sizes s = check_inputs(op, in, augment, activation);
    check_grads(op, grad_fused, grad_pairs, s, features[0]);
    GradTensors grads(s, features[0]);
    backward(op, in, s, contiguous(grad_fused), contiguous(grad_pairs), grads);
    return grads.in_order();
  }

 private:
  // A dispatcher call costs more than the smallest fusions.
  static Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
};

}  // namespace msacore::matrix_fusion
