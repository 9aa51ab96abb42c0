// Low-rank fusion: what the operators accept, on every device.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>
#include <vector>

#include "core/allocate.h"
#include "core/dtype.h"
#include "core/optional.h"
#include "core/round.h"

namespace msacore::low_rank_fusion {

struct Inputs {
  const std::vector<Tensor>&features, &factors;  // M times [B, d_m], M times [r, d_m + 1, h]
  const Tensor &rank_weight, &bias;
  const OptionalTensor& available;
};

// Rows of projections are padded to whole vectors of every device.
constexpr int64_t kRowMultiple = 16;

struct Sizes {
  int64_t batch, modalities, rank, width;  // B, M, r, h
  std::vector<int64_t> features;           // d_m

  int64_t padded_width() const { return round_up(width, kRowMultiple); }
  // Shape of the kept projections [x_m; 1] factors_m[r] (accumulation dtype) of `kept` modalities.
  std::vector<int64_t> projections(int64_t kept) const { return {kept, rank, batch, padded_width()}; }
};

inline Sizes check_inputs(const char* op, const Inputs& in) {
  const int64_t modalities = static_cast<int64_t>(in.features.size());
  check(modalities >= 1, op, "expected `features` to hold at least 1 modality, got 0");
  check(in.factors.size() == in.features.size(), op,
        "expected `factors` to hold a tensor per modality, M = ", modalities, ", got ", in.factors.size());
  const Tensor& first = in.features[0];
  check_floating(first, op, "features[0]");
  check_shape(first, op, "features[0]", {-1, -1}, "[B, d_m]");
  const auto check_one = [&](const Tensor& t, const std::string& name, std::initializer_list<int64_t> shape,
                             const char* meaning, ScalarType dtype) {
    check_dtype(t, op, name, dtype);
    check_shape(t, op, name, shape, meaning);
    check_device(t, op, name, first);
  };
  const ScalarType dtype = first.scalar_type();
  check_one(in.rank_weight, "rank_weight", {-1}, "[r]", dtype);
  check_one(in.bias, "bias", {-1}, "[h]", dtype);
  Sizes s{first.size(0), modalities, in.rank_weight.size(0), in.bias.size(0), {}};
  for (int64_t m = 0; m < modalities; ++m) {
    const std::string index = "[" + std::to_string(m) + "]";
    check_one(in.features[m], "features" + index, {s.batch, -1}, "[B, d_m]", dtype);
    s.features.push_back(in.features[m].size(1));
    check_one(in.factors[m], "factors" + index, {s.rank, s.features[m] + 1, s.width}, "[r, d_m + 1, h]", dtype);
  }
  if (in.available) check_one(*in.available, "available", {s.batch, modalities}, "[B, M]", ScalarType::Bool);
  return s;
}

// What the gradient operator returns, before it is computed.
struct GradTensors {
  std::vector<Tensor> features, factors;
  Tensor rank_weight, bias;

  GradTensors(const Sizes& s, const Tensor& like)
      : rank_weight(empty_tensor(like, {s.rank})), bias(empty_tensor(like, {s.width})) {
    for (int64_t d : s.features) {
      features.push_back(empty_tensor(like, {s.batch, d}));
      factors.push_back(empty_tensor(like, {s.rank, d + 1, s.width}));
    }
  }

  std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor> in_order() const {
    return {features, factors, rank_weight, bias};
  }
};

// The operators of a device: `forward` and `backward` get arguments that were checked. `forward` writes and `backward`
// reads `projections`, which is empty where they are not kept.
template <void (*forward)(const char* op, const Inputs&, const Sizes&, Tensor& out, Tensor& projections),
          void (*backward)(const char* op, const Inputs&, const Sizes&, const Tensor& grad_out,
                           const Tensor& projections, GradTensors&)>
struct LowRankOperators {
  static std::tuple<Tensor, Tensor> low_rank_fusion(const std::vector<Tensor>& features,
                                                    const std::vector<Tensor>& factors, const Tensor& rank_weight,
                                                    const Tensor& bias, const OptionalTensor& available, bool keep) {
    constexpr const char* op = "low_rank_fusion";
    const Inputs in{features, factors, rank_weight, bias, available};
    const Sizes s = check_inputs(op, in);
    Tensor out = empty_tensor(features[0], {s.batch, s.width});
    constexpr int64_t kMostKept = int64_t{1} << 26;  // bytes
    const ScalarType dtype = acc_dtype(out.scalar_type());
    const int64_t size = dtype == ScalarType::Double ? sizeof(double) : sizeof(float);
    if (s.modalities * s.rank * s.batch * s.padded_width() * size > kMostKept) keep = false;
    Tensor projections = empty_tensor(features[0], s.projections(keep ? s.modalities : 0), dtype);
    forward(op, in, s, out, projections);
    return {out, projections};
  }

  static std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor> low_rank_fusion_backward(
      const Tensor& grad_out, const Tensor& projections, const std::vector<Tensor>& features,
      const std::vector<Tensor>& factors, const Tensor& rank_weight, const Tensor& bias,
      const OptionalTensor& available) {
    constexpr const char* op = "low_rank_fusion_backward";
    const Inputs in{features, factors, rank_weight, bias, available};
    const Sizes s = check_inputs(op, in);
    check_dtype(grad_out, op, "grad_out", features[0].scalar_type());
    check_shape(grad_out, op, "grad_out", {s.batch, s.width}, "[B, h]");
    check_device(grad_out, op, "grad_out", features[0]);
    const bool kept = projections.dim() > 0 && projections.size(0) > 0;
    check_dtype(projections, op, "projections", acc_dtype(features[0].scalar_type()));
    check_shape(projections, op, "projections", {kept ? s.modalities : 0, s.rank, s.batch, s.padded_width()},
                "[M or 0, r, B, h padded]");
    check_device(projections, op, "projections", features[0]);
    GradTensors grads(s, features[0]);
    backward(op, in, s, grad_out, torch::stable::contiguous(projections), grads);
    return grads.in_order();
  }
};

}  // namespace msacore::low_rank_fusion
