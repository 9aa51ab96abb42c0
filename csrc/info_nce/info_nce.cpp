// InfoNCE on the CPU: tiles of similarities are computed, used and forgotten, in the forward pass and again in the
// backward pass; what is kept are three numbers per row.
#include "info_nce/info_nce.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstring>
#include <tuple>

#include "contrastive/cpu/classes.h"
#include "contrastive/cpu/sweep.h"

namespace msacore::info_nce::cpu {
using namespace contrastive::cpu;
namespace {

double read_temperature(const char* op, const InfoNceInputs& in, const InfoNceOptions& options) {
  if (!in.learned_temperature) return options.temperature;
  const double value = dispatch_floating(in.learned_temperature->scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return static_cast<double>(static_cast<acc_t<T>>(*in.learned_temperature->const_data_ptr<T>()));
  });
  check_temperature(op, "temperature", value);
  return value;
}

Buffer<uint8_t> used_rows(const bool* mask, const int64_t* labels, int64_t n) {
  Buffer<uint8_t> used(n);
  for (int64_t i = 0; i < n; ++i) used[i] = (!mask || mask[i]) && (!labels || labels[i] >= 0);
  return used;
}

// The loss as one term between one or two sides.
template <typename T>
struct Problem {
  using A = acc_t<T>;
  InfoNceSizes size;
  InfoNceOptions options;
  double temperature;
  const int64_t *anchor_labels, *candidate_labels;
  const T* weights;
  std::vector<Side<A>> sides;
  std::vector<Term<A>> terms;

  Problem(const char* op, const InfoNceInputs& in, const InfoNceSizes& size, const InfoNceOptions& options)
      : size(size),
        options(options),
        temperature(read_temperature(op, in, options)),
        anchor_labels(data_or_null<int64_t>(in.anchor_labels)),
        candidate_labels(data_or_null<int64_t>(in.candidate_labels)),
        weights(data_or_null<T>(in.weights)) {
    Term<A> term{};
    term.rows.used = used_rows(data_or_null<bool>(in.anchor_mask), anchor_labels, size.anchors);
    term.columns.used = used_rows(data_or_null<bool>(in.candidate_mask), candidate_labels, size.candidates);
    // An embedding with itself needs half the tiles, provided both roles are played by the same rows.
    const auto differ = [&](const auto* x, const auto* y) {
      return x && std::memcmp(x, y, size.anchors * sizeof(*x)) != 0;
    };
    const bool self = !in.candidates && !weights && !differ(term.rows.used.get(), term.columns.used.get()) &&
                      !differ(anchor_labels, candidate_labels);
    sides.reserve(2);
    sides.emplace_back(in.anchors.const_data_ptr<T>(), term.rows.used.get(), size.anchors, size.width);
    if (!self)
      sides.emplace_back((in.candidates ? *in.candidates : in.anchors).template const_data_ptr<T>(),
                         term.columns.used.get(), size.candidates, size.width);
    term.a = &sides.front();
    term.b = &sides.back();
    term.scale = M_LOG2E / temperature;
    term.both = options.symmetric && !self;
    term.diagonal = !anchor_labels && !weights && !options.exclude_self;
    term.exclude_self = options.exclude_self;
    count_candidates(term.rows, size.anchors, term.columns, size.candidates, options.exclude_self);
    count_candidates(term.columns, size.candidates, term.rows, size.anchors, options.exclude_self);
    terms.push_back(std::move(term));
  }

  Term<A>& term() { return terms.front(); }
  Labels row_labels() { return {anchor_labels, term().rows.used.get(), size.anchors}; }
  Labels column_labels() { return {candidate_labels, term().columns.used.get(), size.candidates}; }

  // Calls visit(i, j, similarity, weight index) for the pairs of a tile that take part.
  template <typename Visit>
  void visit_pairs(const Tile<A>& tile, int64_t row, int64_t column, Visit&& visit) const {
    for (int64_t i = 0; i < tile.m; ++i) {
      if (!takes_part(tile.from_a[i])) continue;
      for (int64_t j = 0; j < tile.n; ++j) {
        if (!takes_part(tile.from_b[j]) || (options.exclude_self && j == i + tile.diagonal)) continue;
        visit(row + i, column + j, tile.s[i * kTileRow + j], (row + i) * size.candidates + column + j);
      }
    }
  }

  void forward(const char* op) {
    Term<A>& t = term();
    std::atomic<bool> negative{false};
    sum_exponentials(terms, [&](const Term<A>&, const Tile<A>& tile, int64_t row, int64_t column) {
      if (!weights) return;
      visit_pairs(tile, row, column, [&](int64_t i, int64_t j, A similarity, int64_t at) {
        const double weight = static_cast<double>(static_cast<A>(weights[at]));
        if (weight < 0) negative = true;
        t.rows.total[i] += weight;
        t.rows.positive[i] += weight * similarity;
        if (!t.both) return;
        t.columns.total[j] += weight;
        t.columns.positive[j] += weight * similarity;
      });
    });
    check(!negative, op, "expected `weights` to be at least 0, got a negative one");
    if (weights) {
      for (int64_t i = 0; i < size.anchors; ++i)
        if (t.rows.total[i] != 0) t.rows.positive[i] /= t.rows.total[i];
      for (int64_t j = 0; j < size.candidates; ++j)
        if (t.columns.total[j] != 0) t.columns.positive[j] /= t.columns.total[j];
    }
    if (anchor_labels) {
      const Labels rows = row_labels(), columns = column_labels();
      class_positives(*t.a, rows, *t.b, columns, options.exclude_self, t.rows);
      if (t.both) class_positives(*t.b, columns, *t.a, rows, options.exclude_self, t.columns);
    }
  }

  void backward(const A* grad_out, const A* row_stats, const A* column_stats, T* grad_weights) {
    Term<A>& t = term();
    const double factor = t.both ? 0.5 : 1.0;
    const auto gradient_of = [&](int64_t i, int64_t count) {
      const double gradient = static_cast<double>(grad_out[options.reduction == kNone ? i : 0]) * factor;
      return options.reduction == kMean ? gradient / static_cast<double>(count) : gradient;
    };
    load_shares(t, t.rows, *t.a, row_stats, gradient_of);
    if (!t.self()) load_shares(t, t.columns, *t.b, t.both ? column_stats : nullptr, gradient_of);
    for (Side<A>& side : sides) side.gradient = Buffer<A>(side.rows * side.width, A(0));
    const auto weight_gradients = [&](const Term<A>&, const Tile<A>& tile, int64_t row, int64_t column) {
      if (!weights) return;
      visit_pairs(tile, row, column, [&](int64_t i, int64_t j, A similarity, int64_t at) {
        const double gradient = t.rows.attract[i] * (similarity - t.rows.positive[i]) +
                                t.columns.attract[j] * (similarity - t.columns.positive[j]);
        grad_weights[at] = static_cast<T>(static_cast<A>(-gradient / temperature));
      });
    };
    const auto attract_weighted = [&](const Term<A>&, const Tile<A>& tile, int64_t row, int64_t column) {
      if (!weights) return;
      visit_pairs(tile, row, column, [&](int64_t i, int64_t j, A, int64_t at) {
        tile.s[(i - row) * kTileRow + j - column] -=
            static_cast<A>(weights[at]) * (t.rows.attract[i] + t.columns.attract[j]);
      });
    };
    add_gradients(terms, weight_gradients, attract_weighted);
    if (!anchor_labels) return;
    const Labels rows = row_labels(), columns = column_labels();
    attract_classes(*t.a, rows, t.rows, *t.b, columns, t.other(), options.exclude_self);
    if (!t.self()) attract_classes(*t.b, columns, t.columns, *t.a, rows, t.rows, options.exclude_self);
  }

  // Gradients of anchors and candidates; returns that of the temperature.
  double project(T* grad_anchors, T* grad_candidates, bool one_tensor) {
    const A scale = static_cast<A>(1 / temperature);
    const Side<A>&a = *term().a, &b = *term().b;
    double pull = 0;
    if (term().self()) {
      pull = a.project(grad_anchors, scale) / 2;
    } else if (!one_tensor) {
      pull = a.project(grad_anchors, scale);
      b.project(grad_candidates, scale);
    } else {
      const Buffer<A> first(a.n * a.d), second(a.n * a.d);
      pull = a.project(first.get(), scale);
      b.project(second.get(), scale);
      for (int64_t i = 0; i < a.n * a.d; ++i) grad_anchors[i] = static_cast<T>(first[i] + second[i]);
    }
    return -pull / (temperature * temperature);
  }
};

void refuse_what_is_to_come(const char* op, const InfoNceInputs& in, const InfoNceOptions& options) {
  check(!in.negatives && options.normalize && options.denominator == kAll, op,
        "`negatives`, `denominator` and `normalize` are not implemented on the CPU");
}

void forward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
             InfoNceResults& results) {
  refuse_what_is_to_come(op, in, options);
  const int64_t reduction = options.reduction;
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    Problem<T> problem(op, in, s, options);
    problem.forward(op);
    A* out = results.loss.template mutable_data_ptr<A>();
    int64_t row_count = 0, column_count = 0;
    std::vector<double> per_row = anchor_losses(problem.term(), problem.term().rows, s.anchors,
                                                results.anchor_stats.template mutable_data_ptr<A>(), &row_count);
    if (options.symmetric) {
      const std::vector<double> per_column =
          anchor_losses(problem.term(), problem.term().other(), s.candidates,
                        results.candidate_stats.template mutable_data_ptr<A>(), &column_count);
      if (reduction == kNone)
        for (int64_t i = 0; i < s.anchors; ++i) per_row[i] = (per_row[i] + per_column[i]) / 2;
      const double total = std::accumulate(per_column.begin(), per_column.end(), 0.0);
      const double rows = std::accumulate(per_row.begin(), per_row.end(), 0.0);
      if (reduction == kSum) *out = static_cast<A>((rows + total) / 2);
      if (reduction == kMean)
        *out =
            static_cast<A>((rows / std::max<int64_t>(1, row_count) + total / std::max<int64_t>(1, column_count)) / 2);
    } else if (reduction != kNone) {
      const double rows = std::accumulate(per_row.begin(), per_row.end(), 0.0);
      *out = static_cast<A>(reduction == kSum ? rows : rows / std::max<int64_t>(1, row_count));
    }
    if (reduction == kNone)
      for (int64_t i = 0; i < s.anchors; ++i) out[i] = static_cast<A>(per_row[i]);
  });
}

InfoNceGradients backward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
                          const Tensor& grad_out, const Tensor& anchor_stats, const Tensor& candidate_stats) {
  refuse_what_is_to_come(op, in, options);
  Tensor grad_weights =
      torch::stable::new_zeros(in.anchors, {in.weights ? s.anchors : 0, in.weights ? s.candidates : 0});
  std::optional<InfoNceGradients> grads;
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    Problem<T> problem(op, in, s, options);
    problem.backward(grad_out.const_data_ptr<A>(), anchor_stats.const_data_ptr<A>(),
                     candidate_stats.const_data_ptr<A>(),
                     in.weights ? grad_weights.template mutable_data_ptr<T>() : nullptr);
    // After the sweep: the memory of the panels, no longer needed, serves the results.
    for (Side<A>& side : problem.sides) side.panels = Buffer<A>();
    grads.emplace(in, s);
    grads->weights = grad_weights;
    const double slope = problem.project(grads->anchors.template mutable_data_ptr<T>(),
                                         grads->candidates.template mutable_data_ptr<T>(), !in.candidates);
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
  m.def("info_nce(" MSACORE_INFO_NCE_ARGUMENTS ", " MSACORE_INFO_NCE_OPTIONS ") -> (Tensor, Tensor, Tensor)");
  m.def("info_nce_backward(Tensor grad_out, " MSACORE_INFO_NCE_ARGUMENTS
        ", Tensor anchor_stats, Tensor candidate_stats, " MSACORE_INFO_NCE_OPTIONS
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&msacore::info_nce::cpu::Operators::info_nce));
  m.impl("info_nce_backward", TORCH_BOX(&msacore::info_nce::cpu::Operators::info_nce_backward));
}
