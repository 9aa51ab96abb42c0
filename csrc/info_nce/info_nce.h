// InfoNCE: what the operators accept and return, on every device.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "core/allocate.h"
#include "core/dtype.h"
#include "core/optional.h"
#include "core/round.h"

namespace msacore::info_nce {
using msacore::contiguous;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };
// Which candidates an anchor's denominator holds: all; for each positive, itself and the candidates that are not
// positive; only those that are not positive.
enum Denominator : int64_t { kAll = 0, kNegatives = 1, kDecoupled = 2 };

struct InfoNceInputs {
  Tensor anchors;             // [N, d]
  OptionalTensor candidates;  // [N', d]; absent: the anchors themselves
  OptionalTensor learned_temperature, anchor_labels, candidate_labels, weights;
  OptionalTensor negatives, negative_mask;  // [Q, d] and [Q]: further candidates, positive for no anchor
  OptionalTensor anchor_mask, candidate_mask;
};

struct InfoNceOptions {
  double temperature;
  bool symmetric, exclude_self, normalize;
  int64_t denominator, reduction;
};

struct InfoNceSizes {
  int64_t anchors, candidates, negatives, width;
};

// What the forward pass keeps of every row that may be an anchor, [rows, N], in the accumulation dtype. Similarities
// are those before the division by the temperature; both logarithms are natural.
enum Stat : int64_t {
  kHighest = 0,   // highest similarity of the denominator (any shift of similar size will do)
  kLog = 1,       // log Σ exp((similarity - highest) / temperature) of the denominator; -inf where it is empty
  kPositive = 2,  // mean similarity of the positives; with `kNegatives` the loss of the anchor
  kTotal = 3,     // total weight of the positives; 0 where the anchor drops out of the loss
  kRest = 4       // with `kNegatives` alone: Σ_p Ŵ_p Z / (exp s_p + Z), with Z the sum over the negatives
};
inline int64_t stat_rows(int64_t denominator) { return denominator == kNegatives ? 5 : 4; }

// For few but wide rows, the forward pass keeps the similarities [R, R'] for the backward pass, with both numbers of
// rows padded to 16: to compute them again would take a quarter of the products.
constexpr int64_t kMostKept = int64_t{1} << 21;  // numbers
constexpr int64_t kWide = 64;
inline std::vector<int64_t> kept_shape(const InfoNceSizes& s, bool keep) {
  const int64_t rows = round_up<int64_t>(s.anchors, 16), columns = round_up<int64_t>(s.candidates + s.negatives, 16);
  if (!keep || s.width < kWide || rows * columns > kMostKept) return {0};
  return {rows, columns};
}

// `is_part`: the anchors are a part of a batch, and the caller checks which candidates they are.
inline InfoNceSizes check_inputs(const char* op, const InfoNceInputs& in, const InfoNceOptions& options,
                                 bool is_part = false) {
  const Tensor& anchors = in.anchors;
  check_floating(anchors, op, "anchors");
  check_shape(anchors, op, "anchors", {-1, -1}, "[N, d]");
  const int64_t n = anchors.size(0), d = anchors.size(1);
  int64_t m = n, q = 0;
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
  if (in.negatives) {
    check_dtype(*in.negatives, op, "negatives", anchors.scalar_type());
    check_shape(*in.negatives, op, "negatives", {-1, d}, "[Q, d]");
    check_device(*in.negatives, op, "negatives", anchors);
    q = in.negatives->size(0);
  }
  check(in.negatives || !in.negative_mask, op, "expected `negative_mask` only together with `negatives`");
  check_rows(op, in.negative_mask, "negative_mask", ScalarType::Bool, q, "[Q]", anchors);
  if (in.weights) {
    check_dtype(*in.weights, op, "weights", anchors.scalar_type());
    check_shape(*in.weights, op, "weights", {n, m}, "[N, N']");
    check_device(*in.weights, op, "weights", anchors);
  }
  if (!in.weights && !in.anchor_labels && !is_part)
    check(n == m, op, "expected `candidates` to have as many rows as `anchors` (", n,
          ") when neither `labels` nor `weights` say which are positive, got ", m);
  check(options.denominator >= kAll && options.denominator <= kDecoupled, op,
        "expected `denominator` to be \"all\", \"negatives\" or \"decoupled\", got code ", options.denominator);
  check(options.reduction >= kNone && options.reduction <= kSum, op,
        "expected `reduction` to be \"none\", \"mean\" or \"sum\", got code ", options.reduction);
  if (options.symmetric && options.reduction == kNone)
    check(n == m, op, "expected `candidates` to have as many rows as `anchors` (", n,
          ") with `symmetric` and `reduction` \"none\", got ", m);
  return {n, m, q, d};
}

// Checks the gradient of the loss and what the forward pass saved.
inline void check_saved(const char* op, const InfoNceSizes& s, const InfoNceOptions& options, const Tensor& like,
                        const Tensor& grad_out, const Tensor& anchor_stats, const Tensor& candidate_stats,
                        const Tensor& kept) {
  const ScalarType dtype = acc_dtype(like.scalar_type());
  check_dtype(grad_out, op, "grad_out", dtype);
  check_device(grad_out, op, "grad_out", like);
  if (options.reduction == kNone)
    check_shape(grad_out, op, "grad_out", {s.anchors}, "[N]");
  else
    check_shape(grad_out, op, "grad_out", {}, "[]");
  const int64_t rows = stat_rows(options.denominator);
  check_dtype(anchor_stats, op, "anchor_stats", dtype);
  check_shape(anchor_stats, op, "anchor_stats", {rows, s.anchors}, "[S, N]");
  check_device(anchor_stats, op, "anchor_stats", like);
  check_dtype(candidate_stats, op, "candidate_stats", dtype);
  check_shape(candidate_stats, op, "candidate_stats", {rows, options.symmetric ? s.candidates : 0},
              "[S, N'] or [S, 0]");
  check_device(candidate_stats, op, "candidate_stats", like);
  check_dtype(kept, op, "kept", dtype);
  check_device(kept, op, "kept", like);
  const std::vector<int64_t> full = kept_shape(s, true);
  if (kept.dim() == 1 || full.size() == 1)
    check_shape(kept, op, "kept", {0}, "[0]");
  else
    check_shape(kept, op, "kept", {full[0], full[1]}, "[R, R']");
}

inline InfoNceInputs contiguous(const InfoNceInputs& in) {
  return {torch::stable::contiguous(in.anchors),
          contiguous(in.candidates),
          contiguous(in.learned_temperature),
          contiguous(in.anchor_labels),
          contiguous(in.candidate_labels),
          contiguous(in.weights),
          contiguous(in.negatives),
          contiguous(in.negative_mask),
          contiguous(in.anchor_mask),
          contiguous(in.candidate_mask)};
}

struct InfoNceResults {
  Tensor loss, anchor_stats, candidate_stats, kept;

  InfoNceResults(const Tensor& like, const InfoNceSizes& s, const InfoNceOptions& options, bool keep) {
    const ScalarType dtype = acc_dtype(like.scalar_type());
    const int64_t rows = stat_rows(options.denominator);
    loss = options.reduction == kNone ? empty_tensor(like, {s.anchors}, dtype) : empty_tensor(like, {}, dtype);
    anchor_stats = empty_tensor(like, {rows, s.anchors}, dtype);
    candidate_stats = empty_tensor(like, {rows, options.symmetric ? s.candidates : 0}, dtype);
    kept = empty_tensor(like, kept_shape(s, keep), dtype);
  }
};

// Gradients of the arguments; those of absent arguments are empty.
struct InfoNceGradients {
  Tensor anchors, candidates, temperature, weights, negatives;

  InfoNceGradients(const InfoNceInputs& in, const InfoNceSizes& s) {
    const auto rows = [&](const OptionalTensor& t, int64_t count) {
      return empty_tensor(in.anchors, {t ? count : 0, s.width});
    };
    anchors = rows(in.anchors, s.anchors);
    candidates = rows(in.candidates, s.candidates);
    negatives = rows(in.negatives, s.negatives);
    temperature = in.learned_temperature ? empty_tensor(*in.learned_temperature, {}) : empty_tensor(in.anchors, {0});
    weights = empty_tensor(in.anchors, {in.weights ? s.anchors : 0, in.weights ? s.candidates : 0});
  }
};

// The operators of a device. `forward` fills its results; `backward` allocates the gradients itself, at a time when it
// has memory for them. Both get contiguous arguments that were checked.
template <void (*forward)(const char* op, const InfoNceInputs&, const InfoNceSizes&, const InfoNceOptions&,
                          InfoNceResults&),
          InfoNceGradients (*backward)(const char* op, const InfoNceInputs&, const InfoNceSizes&, const InfoNceOptions&,
                                       const Tensor& grad_out, const Tensor& anchor_stats,
                                       const Tensor& candidate_stats, const Tensor& kept)>
struct InfoNceOperators {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce(
      const Tensor& anchors, const OptionalTensor& candidates, const OptionalTensor& learned_temperature,
      const OptionalTensor& anchor_labels, const OptionalTensor& candidate_labels, const OptionalTensor& weights,
      const OptionalTensor& negatives, const OptionalTensor& negative_mask, const OptionalTensor& anchor_mask,
      const OptionalTensor& candidate_mask, double temperature, bool symmetric, bool exclude_self, bool normalize,
      int64_t denominator, int64_t reduction, bool keep) {
    constexpr const char* op = "info_nce";
    const InfoNceInputs in{anchors, candidates, learned_temperature, anchor_labels, candidate_labels,
                           weights, negatives,  negative_mask,       anchor_mask,   candidate_mask};
    const InfoNceOptions options{temperature, symmetric, exclude_self, normalize, denominator, reduction};
    const InfoNceSizes s = check_inputs(op, in, options);
    InfoNceResults results(anchors, s, options, keep);
    forward(op, contiguous(in), s, options, results);
    return {results.loss, results.anchor_stats, results.candidate_stats, results.kept};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_backward(
      const Tensor& grad_out, const Tensor& anchors, const OptionalTensor& candidates,
      const OptionalTensor& learned_temperature, const OptionalTensor& anchor_labels,
      const OptionalTensor& candidate_labels, const OptionalTensor& weights, const OptionalTensor& negatives,
      const OptionalTensor& negative_mask, const OptionalTensor& anchor_mask, const OptionalTensor& candidate_mask,
      const Tensor& anchor_stats, const Tensor& candidate_stats, const Tensor& kept, double temperature, bool symmetric,
      bool exclude_self, bool normalize, int64_t denominator, int64_t reduction) {
    constexpr const char* op = "info_nce_backward";
    const InfoNceInputs in{anchors, candidates, learned_temperature, anchor_labels, candidate_labels,
                           weights, negatives,  negative_mask,       anchor_mask,   candidate_mask};
    const InfoNceOptions options{temperature, symmetric, exclude_self, normalize, denominator, reduction};
    const InfoNceSizes s = check_inputs(op, in, options);
    check_saved(op, s, options, anchors, grad_out, anchor_stats, candidate_stats, kept);
    const InfoNceGradients grads = backward(
        op, contiguous(in), s, options, torch::stable::contiguous(grad_out), torch::stable::contiguous(anchor_stats),
        torch::stable::contiguous(candidate_stats), torch::stable::contiguous(kept));
    return {grads.anchors, grads.candidates, grads.temperature, grads.weights, grads.negatives};
  }
};

}  // namespace msacore::info_nce
