// Rank-N-Contrast: what the operators accept and allocate, on every device.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "core/allocate.h"
#include "core/dtype.h"
#include "core/optional.h"

namespace msacore::rank_n_contrast {
using msacore::contiguous;

// A call whose arguments were checked. Tensors are contiguous.
struct Problem {
  Tensor embeddings, targets;          // [N, d]; [N] or [N, k]
  OptionalTensor learned_temperature;  // [], float64
  OptionalTensor mask;                 // [N]
  double temperature;                  // where none is learned
  int64_t samples, width, labels;      // N, d, k: one label per sample is k = 1 in either shape
  // The anchors whose terms are summed, as places in an order of the unmasked samples that every call with the same
  // targets and mask shares. The divisor, n (n - 1), does not depend on them.
  int64_t anchor_begin, anchor_end;
};

inline Problem check_inputs(const char* op, const Tensor& embeddings, const Tensor& targets,
                            const OptionalTensor& learned_temperature, const OptionalTensor& mask, double temperature,
                            int64_t anchor_begin, int64_t anchor_count) {
  check_floating(embeddings, op, "embeddings");
  check_shape(embeddings, op, "embeddings", {-1, -1}, "[N, d]");
  const int64_t n = embeddings.size(0);
  check(is_floating(targets.scalar_type()) || targets.scalar_type() == ScalarType::Long, op,
        "expected `targets` to have dtype float16, bfloat16, float32, float64 or int64, got ",
        dtype_name(targets.scalar_type()));
  if (targets.dim() == 2) {
    check_shape(targets, op, "targets", {n, -1}, "[N, k]");
  } else {
    check_shape(targets, op, "targets", {n}, "[N] or [N, k]");
  }
  check_device(targets, op, "targets", embeddings);
  if (learned_temperature) {
    check_floating(*learned_temperature, op, "temperature");
    check_shape(*learned_temperature, op, "temperature", {}, "[] (0-d)");
    check_device(*learned_temperature, op, "temperature", embeddings);
  } else {
    check_temperature(op, "temperature", temperature);
  }
  check_rows(op, mask, "mask", ScalarType::Bool, n, "[N]", embeddings);
  check(anchor_begin >= 0, op, "expected `anchor_begin` to be at least 0, got ", anchor_begin);
  check(anchor_count >= -1, op, "expected `anchor_count` to be at least 0, or -1 for all, got ", anchor_count);
  const int64_t begin = std::min(anchor_begin, n);
  const int64_t end = anchor_count < 0 ? n : begin + std::min(anchor_count, n - begin);
  return {embeddings,  targets, learned_temperature, mask,
          temperature, n,       embeddings.size(1),  targets.dim() == 2 ? targets.size(1) : 1,
          begin,       end};
}

// The operators of a device: `forward` and `backward` fill their outputs; they are called with at least two samples and
// one anchor. grad_out and grad_temperature are float64, the latter empty where the temperature is not learned.
template <void (*forward)(const char* op, const Problem&, Tensor& out),
          void (*backward)(const char* op, const Problem&, const Tensor& grad_out, Tensor& grad_embeddings,
                           Tensor& grad_temperature)>
struct RankOperators {
  static Tensor rank_n_contrast(const Tensor& embeddings, const Tensor& targets,
                                const OptionalTensor& learned_temperature, const OptionalTensor& mask,
                                double temperature, int64_t anchor_begin, int64_t anchor_count) {
    constexpr const char* op = "rank_n_contrast";
    Problem problem =
        check_inputs(op, embeddings, targets, learned_temperature, mask, temperature, anchor_begin, anchor_count);
    Tensor out = empty_tensor(embeddings, {}, acc_dtype(embeddings.scalar_type()));
    if (is_empty(problem)) {
      torch::stable::zero_(out);
    } else {
      prepare(problem);
      forward(op, problem, out);
    }
    return out;
  }

  static std::tuple<Tensor, Tensor> rank_n_contrast_backward(const Tensor& grad_out, const Tensor& embeddings,
                                                             const Tensor& targets,
                                                             const OptionalTensor& learned_temperature,
                                                             const OptionalTensor& mask, double temperature,
                                                             int64_t anchor_begin, int64_t anchor_count) {
    constexpr const char* op = "rank_n_contrast_backward";
    Problem problem =
        check_inputs(op, embeddings, targets, learned_temperature, mask, temperature, anchor_begin, anchor_count);
    check_shape(grad_out, op, "grad_out", {}, "[]");
    check_dtype(grad_out, op, "grad_out", acc_dtype(embeddings.scalar_type()));
    check_device(grad_out, op, "grad_out", embeddings);
    Tensor grad_embeddings = empty_tensor(embeddings, {problem.samples, problem.width});
    if (is_empty(problem)) {
      torch::stable::zero_(grad_embeddings);
      if (!learned_temperature) return {grad_embeddings, empty_tensor(embeddings, {0})};
      return {grad_embeddings, torch::stable::new_zeros(*learned_temperature, {})};
    }
    prepare(problem);
    Tensor grad_temperature = learned_temperature ? empty_tensor(*learned_temperature, {}, ScalarType::Double)
                                                  : empty_tensor(embeddings, {0}, ScalarType::Double);
    backward(op, problem, torch::stable::to(grad_out, ScalarType::Double), grad_embeddings, grad_temperature);
    const Tensor& like = learned_temperature ? *learned_temperature : embeddings;
    return {grad_embeddings, torch::stable::to(grad_temperature, like.scalar_type())};
  }

 private:
  static bool is_empty(const Problem& problem) {
    return problem.samples < 2 || problem.anchor_begin >= problem.anchor_end;
  }

  static void prepare(Problem& problem) {
    problem.embeddings = torch::stable::contiguous(problem.embeddings);
    problem.targets = torch::stable::contiguous(problem.targets);
    problem.mask = contiguous(problem.mask);
    if (problem.learned_temperature)
      problem.learned_temperature = torch::stable::to(*problem.learned_temperature, ScalarType::Double);
  }
};

}  // namespace msacore::rank_n_contrast
