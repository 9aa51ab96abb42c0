// InfoNCE of a part of the anchors on the CPU: the sweeps of info_nce, with results that can be merged.
#include "info_nce/info_nce_partial.h"

#include <torch/csrc/stable/library.h>

#include "info_nce/info_nce_problem.h"

namespace msacore::info_nce::cpu {
namespace {

template <typename A>
void write_sums(const Term<A>& term, const Direction<A>& direction, int64_t n, A* out) {
  for (int64_t i = 0; i < n; ++i) {
    const bool empty = direction.sum[i] == 0;
    const double highest = term.bounded() ? 1.0 : static_cast<double>(direction.highest[i]);
    out[i] = empty ? -std::numeric_limits<A>::infinity() : static_cast<A>(highest);
    out[n + i] = static_cast<A>(direction.sum[i]);
    out[2 * n + i] = static_cast<A>(direction.total[i]);
    out[3 * n + i] = direction.total[i] == 0 ? A(0) : static_cast<A>(direction.total[i] * direction.positive[i]);
  }
}

void forward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
             int64_t diagonal, PartialRows& rows) {
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    Problem<T> problem(op, in, s, options, diagonal);
    problem.sum(op, true);
    const Term<A>& term = problem.term();
    write_sums(term, term.rows, s.anchors, rows.row.template mutable_data_ptr<A>());
    if (options.symmetric) write_sums(term, term.columns, s.candidates, rows.column.template mutable_data_ptr<A>());
  });
}

// Loads the sums over negatives, given as in Stat.
template <typename A>
void load_negatives(Direction<A>& direction, int64_t rows, int64_t n, const A* negatives) {
  std::fill_n(direction.shift, rows, A(0));
  std::fill_n(direction.log, rows, -std::numeric_limits<A>::infinity());
  for (int64_t i = 0; i < n; ++i) {
    direction.shift[i] = negatives[i];
    direction.log[i] = static_cast<A>(negatives[n + i] * M_LOG2E);
  }
}

void positives(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
               int64_t diagonal, const Tensor& row_negatives, const Tensor& column_negatives, PartialRows& rows) {
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    Problem<T> problem(op, in, s, options, diagonal);
    Term<A>& term = problem.term();
    open_rows(term.rows, *term.a, term.scale, term.bounded());
    open_rows(term.columns, *term.b, term.scale, term.bounded());
    load_negatives(term.rows, term.a->rows, s.anchors, row_negatives.const_data_ptr<A>());
    if (term.two_sided) load_negatives(term.columns, term.b->rows, s.candidates, column_negatives.const_data_ptr<A>());
    PositiveSums row_sums, column_sums;
    problem.sum_positives(row_sums, column_sums);
    const auto write = [](const PositiveSums& sums, int64_t n, A* out) {
      for (int64_t i = 0; i < n; ++i) {
        out[i] = static_cast<A>(sums.loss[i]);
        out[n + i] = static_cast<A>(sums.rest[i]);
      }
    };
    write(row_sums, s.anchors, rows.row.template mutable_data_ptr<A>());
    if (term.two_sided) write(column_sums, s.candidates, rows.column.template mutable_data_ptr<A>());
  });
}

void backward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
              int64_t diagonal, const PartialSaved& saved, PartialGradients& grads) {
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    Problem<T> problem(op, in, s, options, diagonal);
    problem.count(*saved.anchors_used.const_data_ptr<int64_t>(), *saved.candidates_used.const_data_ptr<int64_t>());
    Term<A>& term = problem.term();
    const auto load = [&](Direction<A>& direction, const Side<A>& side, int64_t n, const A* stats,
                          const Tensor& scale) {
      const A* gradient = scale.const_data_ptr<A>();
      const int64_t step = scale.dim();
      problem.load(direction, side, n, stats, [=](int64_t i) { return static_cast<double>(gradient[step * i]); });
    };
    load(term.rows, *term.a, s.anchors, saved.row_stats.const_data_ptr<A>(), saved.row_scale);
    load(term.columns, *term.b, s.candidates, term.two_sided ? saved.column_stats.const_data_ptr<A>() : nullptr,
         saved.column_scale);
    T* const weights = in.weights ? grads.weights.template mutable_data_ptr<T>() : nullptr;
    if (weights) std::fill(weights, weights + s.anchors * s.candidates, T(0.0f));
    problem.add_all_gradients(weights);
    *grads.temperature.template mutable_data_ptr<A>() = static_cast<A>(
        problem.project(grads.anchors.template mutable_data_ptr<T>(), grads.candidates.template mutable_data_ptr<A>(),
                        grads.negatives.template mutable_data_ptr<A>(), false));
  });
}

using Operators = InfoNcePartialOperators<forward, positives, backward>;

}  // namespace
}  // namespace msacore::info_nce::cpu

#define MSACORE_PARTIAL_ARGUMENTS                                                           \
  "Tensor anchors, Tensor candidates, Tensor? learned_temperature, Tensor? anchor_labels, " \
  "Tensor? candidate_labels, Tensor? weights, Tensor? negatives, Tensor? negative_mask, "   \
  "Tensor? anchor_mask, Tensor? candidate_mask"
#define MSACORE_PARTIAL_OPTIONS "*, float temperature, bool symmetric, bool exclude_self, bool normalize"

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def("info_nce_partial(" MSACORE_PARTIAL_ARGUMENTS ", " MSACORE_PARTIAL_OPTIONS
        ", int denominator, int diagonal) -> (Tensor, Tensor)");
  m.def("info_nce_partial_positives(" MSACORE_PARTIAL_ARGUMENTS
        ", Tensor row_negatives, Tensor column_negatives, " MSACORE_PARTIAL_OPTIONS
        ", int diagonal) -> (Tensor, Tensor)");
  m.def("info_nce_partial_backward(Tensor row_scale, Tensor column_scale, " MSACORE_PARTIAL_ARGUMENTS
        ", Tensor row_stats, Tensor column_stats, Tensor anchors_used, Tensor candidates_used, " MSACORE_PARTIAL_OPTIONS
        ", int denominator, int diagonal) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  m.impl("info_nce_partial", TORCH_BOX(&msacore::info_nce::cpu::Operators::info_nce_partial));
  m.impl("info_nce_partial_positives", TORCH_BOX(&msacore::info_nce::cpu::Operators::info_nce_partial_positives));
  m.impl("info_nce_partial_backward", TORCH_BOX(&msacore::info_nce::cpu::Operators::info_nce_partial_backward));
}
