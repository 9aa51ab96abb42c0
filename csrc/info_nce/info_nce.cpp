// InfoNCE on the CPU: tiles of similarities are computed, used and discarded, in the forward pass and again in the
// backward pass; all that is kept is a few numbers per row and, where they are few, the similarities.
#include "info_nce/info_nce.h"

#include <torch/csrc/stable/library.h>

#include <numeric>

#include "cpu/huge_pages.h"
#include "info_nce/info_nce_problem.h"

namespace msacore::info_nce::cpu {
namespace {

// Losses of the anchors of a direction, and how many count; fills their stats.
template <typename T>
std::vector<double> finish(const Problem<T>& problem, const Direction<acc_t<T>>& direction, const PositiveSums& sums,
                           int64_t n, acc_t<T>* stats, int64_t* count) {
  using A = acc_t<T>;
  if (problem.options.denominator != kNegatives)
    return anchor_losses(problem.term(), direction, n, problem.disjoint(), stats, count);
  std::vector<double> loss(n, 0.0);
  *count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double total = direction.total[i];
    if (total != 0) loss[i] = sums.loss[i] / total;
    *count += total != 0;
    stats[kHighest * n + i] = direction.shift[i];
    stats[kLog * n + i] = static_cast<A>(direction.log[i] * M_LN2);
    stats[kPositive * n + i] = static_cast<A>(loss[i]);
    stats[kTotal * n + i] = static_cast<A>(total);
    stats[kRest * n + i] = static_cast<A>(total != 0 ? sums.rest[i] / total : 0.0);
  }
  return loss;
}

void forward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
             InfoNceResults& results) {
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    Problem<T> problem(op, in, s, options);
    if (results.kept.numel()) problem.keep(on_huge_pages(results.kept).mutable_data_ptr<A>(), false);
    problem.sum(op, true);
    Term<A>& term = problem.term();
    PositiveSums row_sums, column_sums;
    if (options.denominator == kNegatives) {
      problem.load_softmax(term.rows, term.a->rows, s.anchors);
      if (term.two_sided) problem.load_softmax(term.columns, term.b->rows, s.candidates);
      problem.sum_positives(row_sums, column_sums);
    }
    int64_t row_count = 0, column_count = 0;
    A* out = results.loss.template mutable_data_ptr<A>();
    std::vector<double> per_row = finish(problem, term.rows, row_sums, s.anchors,
                                         results.anchor_stats.template mutable_data_ptr<A>(), &row_count);
    const auto mean_of = [&](double sum, int64_t count) {
      return options.reduction == kMean ? sum / std::max<int64_t>(1, count) : sum;
    };
    double loss = mean_of(std::accumulate(per_row.begin(), per_row.end(), 0.0), row_count);
    if (options.symmetric) {
      const std::vector<double> per_column =
          finish(problem, term.other(), term.self() ? row_sums : column_sums, s.candidates,
                 results.candidate_stats.template mutable_data_ptr<A>(), &column_count);
      loss = (loss + mean_of(std::accumulate(per_column.begin(), per_column.end(), 0.0), column_count)) / 2;
      if (options.reduction == kNone)
        for (int64_t i = 0; i < s.anchors; ++i) per_row[i] = (per_row[i] + per_column[i]) / 2;
    }
    if (options.reduction != kNone) {
      *out = static_cast<A>(loss);
      return;
    }
    for (int64_t i = 0; i < s.anchors; ++i) out[i] = static_cast<A>(per_row[i]);
  });
}

template <typename T>
void load(Problem<T>& problem, const acc_t<T>* grad_out, const acc_t<T>* row_stats, const acc_t<T>* column_stats) {
  using A = acc_t<T>;
  Term<A>& term = problem.term();
  const InfoNceOptions& options = problem.options;
  const double factor = term.two_sided ? 0.5 : 1.0;
  const auto load_direction = [&](Direction<A>& direction, const Side<A>& side, int64_t n, const A* stats) {
    const double count = static_cast<double>(std::max<int64_t>(1, count_anchors(stats, n)));
    const auto gradient_of = [&](int64_t i) {
      const double gradient = static_cast<double>(grad_out[options.reduction == kNone ? i : 0]) * factor;
      return options.reduction == kMean ? gradient / count : gradient;
    };
    problem.load(direction, side, n, stats, gradient_of);
  };
  load_direction(term.rows, *term.a, problem.size.anchors, row_stats);
  if (!term.self())
    load_direction(term.columns, *term.b, problem.size.candidates, term.two_sided ? column_stats : nullptr);
}

InfoNceGradients backward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
                          const Tensor& grad_out, const Tensor& anchor_stats, const Tensor& candidate_stats,
                          const Tensor& kept) {
  Tensor grad_weights =
      torch::stable::new_zeros(in.anchors, {in.weights ? s.anchors : 0, in.weights ? s.candidates : 0});
  std::optional<InfoNceGradients> grads;
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const bool known = kept.numel() > 0;
    Problem<T> problem(op, in, s, options, std::nullopt, known);
    if (known) problem.keep(const_cast<A*>(kept.const_data_ptr<A>()), true);
    load(problem, grad_out.const_data_ptr<A>(), anchor_stats.const_data_ptr<A>(), candidate_stats.const_data_ptr<A>());
    problem.add_all_gradients(in.weights ? grad_weights.template mutable_data_ptr<T>() : nullptr);
    // After the sweep the panels are no longer needed: their memory is released for the results.
    for (Side<A>& side : problem.sides) side.panels = Buffer<A>(), side.pairs = PairRows();
    grads.emplace(in, s);
    grads->weights = grad_weights;
    const double slope =
        problem.project(grads->anchors.template mutable_data_ptr<T>(), grads->candidates.template mutable_data_ptr<T>(),
                        grads->negatives.template mutable_data_ptr<T>(), !in.candidates);
    if (!in.learned_temperature) return;
    dispatch_floating(in.learned_temperature->scalar_type(), op, [&](auto other) {
      using S = typename decltype(other)::type;
      *grads->temperature.template mutable_data_ptr<S>() = static_cast<S>(static_cast<acc_t<S>>(slope));
    });
  });
  return *grads;
}

using Operators = InfoNceOperators<forward, backward>;

}  // namespace
}  // namespace msacore::info_nce::cpu

#define MSACORE_INFO_NCE_ARGUMENTS                                                           \
  "Tensor anchors, Tensor? candidates, Tensor? learned_temperature, Tensor? anchor_labels, " \
  "Tensor? candidate_labels, Tensor? weights, Tensor? negatives, Tensor? negative_mask, "    \
  "Tensor? anchor_mask, Tensor? candidate_mask"
#define MSACORE_INFO_NCE_OPTIONS                                                               \
  "*, float temperature, bool symmetric, bool exclude_self, bool normalize, int denominator, " \
  "int reduction"

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def("info_nce(" MSACORE_INFO_NCE_ARGUMENTS ", " MSACORE_INFO_NCE_OPTIONS
        ", bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("info_nce_backward(Tensor grad_out, " MSACORE_INFO_NCE_ARGUMENTS
        ", Tensor anchor_stats, Tensor candidate_stats, Tensor kept, " MSACORE_INFO_NCE_OPTIONS
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&msacore::info_nce::cpu::Operators::info_nce));
  m.impl("info_nce_backward", TORCH_BOX(&msacore::info_nce::cpu::Operators::info_nce_backward));
}
