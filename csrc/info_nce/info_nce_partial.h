// InfoNCE of a part of the anchors against all candidates, for batches that are distributed over several processes:
// what the operators accept and return, on every device. Partial results of candidates are merged by the caller; the
// gradient operator then takes the merged results.
#pragma once
#include "info_nce/info_nce.h"

namespace msacore::info_nce {

// Per row in the accumulation dtype, similarities before the division by the temperature.
// info_nce_partial [4, rows]: highest similarity of the denominator (-inf: empty), Σ exp((s - highest) / temperature)
// over it, Σ w and Σ w s over the positives; zeros for rows that take no part.
constexpr int64_t kPartialRows = 4;
// info_nce_partial_positives [2, rows], of anchors whose sum Z over the negatives is known: Σ w log(1 + Z / exp s) and
// Σ w Z / (exp s + Z) over the positives. Takes the first two rows of Stat.
constexpr int64_t kPositiveRows = 2, kDenominatorRows = 2;

// `diagonal` stays far enough from the limits of its type that an index can be added to it.
constexpr int64_t kFarthestDiagonal = int64_t{1} << 60;

// In addition to InfoNceOptions, `diagonal` is the index of the candidate that is anchor 0. Candidates may be a part of
// a batch too, so `diagonal` may lie outside them. `reduction` is not used.
inline InfoNceSizes check_partial(const char* op, const InfoNceInputs& in, const InfoNceOptions& options,
                                  int64_t diagonal) {
  const InfoNceSizes s = check_inputs(op, in, options, true);
  check(diagonal >= -kFarthestDiagonal && diagonal <= kFarthestDiagonal, op,
        "expected `diagonal` from -2^60 to 2^60, got ", diagonal);
  return s;
}

inline void check_rows_of(const char* op, const char* name, const Tensor& t, const Tensor& like, int64_t rows,
                          int64_t count, const char* meaning) {
  check_dtype(t, op, name, acc_dtype(like.scalar_type()));
  check_shape(t, op, name, {rows, count}, meaning);
  check_device(t, op, name, like);
}

// The gradient of the loss of every anchor: one number, or one per row.
inline void check_scale(const char* op, const char* name, const Tensor& t, const Tensor& like, int64_t count) {
  check_dtype(t, op, name, acc_dtype(like.scalar_type()));
  check_device(t, op, name, like);
  if (t.dim() == 0)
    check_shape(t, op, name, {}, "[]");
  else
    check_shape(t, op, name, {count}, "[] or one per row");
}

struct PartialRows {
  Tensor row, column;

  PartialRows(const Tensor& like, const InfoNceSizes& s, const InfoNceOptions& options, int64_t rows) {
    const ScalarType dtype = acc_dtype(like.scalar_type());
    row = empty_tensor(like, {rows, s.anchors}, dtype);
    column = empty_tensor(like, {rows, options.symmetric ? s.candidates : 0}, dtype);
  }
};

// The gradients of candidates and negatives are added up over the parts; these gradients and that of the temperature
// keep the accumulation dtype.
struct PartialGradients {
  Tensor anchors, candidates, temperature, weights, negatives;

  PartialGradients(const InfoNceInputs& in, const InfoNceSizes& s) {
    const ScalarType dtype = acc_dtype(in.anchors.scalar_type());
    anchors = empty_tensor(in.anchors, {s.anchors, s.width});
    candidates = empty_tensor(in.anchors, {s.candidates, s.width}, dtype);
    temperature = empty_tensor(in.anchors, {}, dtype);
    weights = empty_tensor(in.anchors, {in.weights ? s.anchors : 0, in.weights ? s.candidates : 0});
    negatives = empty_tensor(in.anchors, {in.negatives ? s.negatives : 0, s.width}, dtype);
  }
};

// What the gradient operator takes from the merged forward pass.
struct PartialSaved {
  Tensor row_scale, column_scale, row_stats, column_stats;
  Tensor anchors_used, candidates_used;  // 0-d int64, over all parts
};

template <void (*forward)(const char* op, const InfoNceInputs&, const InfoNceSizes&, const InfoNceOptions&,
                          int64_t diagonal, PartialRows&),
          void (*positives)(const char* op, const InfoNceInputs&, const InfoNceSizes&, const InfoNceOptions&,
                            int64_t diagonal, const Tensor& row_negatives, const Tensor& column_negatives,
                            PartialRows&),
          void (*backward)(const char* op, const InfoNceInputs&, const InfoNceSizes&, const InfoNceOptions&,
                           int64_t diagonal, const PartialSaved&, PartialGradients&)>
struct InfoNcePartialOperators {
  static std::tuple<Tensor, Tensor> info_nce_partial(
      const Tensor& anchors, const Tensor& candidates, const OptionalTensor& learned_temperature,
      const OptionalTensor& anchor_labels, const OptionalTensor& candidate_labels, const OptionalTensor& weights,
      const OptionalTensor& negatives, const OptionalTensor& negative_mask, const OptionalTensor& anchor_mask,
      const OptionalTensor& candidate_mask, double temperature, bool symmetric, bool exclude_self, bool normalize,
      int64_t denominator, int64_t diagonal) {
    constexpr const char* op = "info_nce_partial";
    const InfoNceInputs in{anchors, candidates, learned_temperature, anchor_labels, candidate_labels,
                           weights, negatives,  negative_mask,       anchor_mask,   candidate_mask};
    const InfoNceOptions options{temperature, symmetric, exclude_self, normalize, denominator, kSum};
    const InfoNceSizes s = check_partial(op, in, options, diagonal);
    PartialRows rows(anchors, s, options, kPartialRows);
    forward(op, contiguous(in), s, options, diagonal, rows);
    return {rows.row, rows.column};
  }

  static std::tuple<Tensor, Tensor> info_nce_partial_positives(
      const Tensor& anchors, const Tensor& candidates, const OptionalTensor& learned_temperature,
      const OptionalTensor& anchor_labels, const OptionalTensor& candidate_labels, const OptionalTensor& weights,
      const OptionalTensor& negatives, const OptionalTensor& negative_mask, const OptionalTensor& anchor_mask,
      const OptionalTensor& candidate_mask, const Tensor& row_negatives, const Tensor& column_negatives,
      double temperature, bool symmetric, bool exclude_self, bool normalize, int64_t diagonal) {
    constexpr const char* op = "info_nce_partial_positives";
    const InfoNceInputs in{anchors, candidates, learned_temperature, anchor_labels, candidate_labels,
                           weights, negatives,  negative_mask,       anchor_mask,   candidate_mask};
    const InfoNceOptions options{temperature, symmetric, exclude_self, normalize, kNegatives, kSum};
    const InfoNceSizes s = check_partial(op, in, options, diagonal);
    check_rows_of(op, "row_negatives", row_negatives, anchors, kDenominatorRows, s.anchors, "[2, N]");
    check_rows_of(op, "column_negatives", column_negatives, anchors, kDenominatorRows, symmetric ? s.candidates : 0,
                  "[2, N'] or [2, 0]");
    PartialRows rows(anchors, s, options, kPositiveRows);
    positives(op, contiguous(in), s, options, diagonal, torch::stable::contiguous(row_negatives),
              torch::stable::contiguous(column_negatives), rows);
    return {rows.row, rows.column};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_partial_backward(
      const Tensor& row_scale, const Tensor& column_scale, const Tensor& anchors, const Tensor& candidates,
      const OptionalTensor& learned_temperature, const OptionalTensor& anchor_labels,
      const OptionalTensor& candidate_labels, const OptionalTensor& weights, const OptionalTensor& negatives,
      const OptionalTensor& negative_mask, const OptionalTensor& anchor_mask, const OptionalTensor& candidate_mask,
      const Tensor& row_stats, const Tensor& column_stats, const Tensor& anchors_used, const Tensor& candidates_used,
      double temperature, bool symmetric, bool exclude_self, bool normalize, int64_t denominator, int64_t diagonal) {
    constexpr const char* op = "info_nce_partial_backward";
    const InfoNceInputs given{anchors, candidates, learned_temperature, anchor_labels, candidate_labels,
                              weights, negatives,  negative_mask,       anchor_mask,   candidate_mask};
    const InfoNceOptions options{temperature, symmetric, exclude_self, normalize, denominator, kSum};
    const InfoNceSizes s = check_partial(op, given, options, diagonal);
    check_scale(op, "row_scale", row_scale, anchors, s.anchors);
    check_scale(op, "column_scale", column_scale, anchors, s.candidates);
    const int64_t rows = stat_rows(denominator);
    check_rows_of(op, "row_stats", row_stats, anchors, rows, s.anchors, "[S, N]");
    check_rows_of(op, "column_stats", column_stats, anchors, rows, symmetric ? s.candidates : 0, "[S, N'] or [S, 0]");
    for (const auto& [name, t] : {std::pair{"anchors_used", &anchors_used}, {"candidates_used", &candidates_used}}) {
      check_dtype(*t, op, name, ScalarType::Long);
      check_shape(*t, op, name, {}, "[]");
      check_device(*t, op, name, anchors);
    }
    const InfoNceInputs in = contiguous(given);
    PartialGradients grads(in, s);
    backward(
        op, in, s, options, diagonal,
        {torch::stable::contiguous(row_scale), torch::stable::contiguous(column_scale),
         torch::stable::contiguous(row_stats), torch::stable::contiguous(column_stats), anchors_used, candidates_used},
        grads);
    return {grads.anchors, grads.candidates, grads.temperature, grads.weights, grads.negatives};
  }
};

}  // namespace msacore::info_nce
