// InfoNCE on the CPU as one term, of one or two sides: what its sweeps do with the pairs of a tile.
//
// Owns the rows (sides) and what is kept per row (the term's directions). Forward: `sum` over all tiles, with
// `Denominator::kNegatives` also `sum_positives` over all tiles, then losses of anchors from the sums. Backward:
// `load` per direction from what the forward pass kept, `add_gradients` over all tiles, `project`.
#pragma once
#include <atomic>
#include <cstring>

#include "contrastive/cpu/anchors.h"
#include "contrastive/cpu/classes.h"
#include "info_nce/info_nce.h"

namespace msacore::info_nce::cpu {
using namespace contrastive::cpu;

inline double read_temperature(const char* op, const InfoNceInputs& in, const InfoNceOptions& options) {
  if (!in.learned_temperature) return options.temperature;
  const double value = dispatch_floating(in.learned_temperature->scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return static_cast<double>(static_cast<acc_t<T>>(*in.learned_temperature->const_data_ptr<T>()));
  });
  check_temperature(op, "temperature", value);
  return value;
}

inline void mark_used(uint8_t* used, const bool* mask, const int64_t* labels, int64_t n) {
  for (int64_t i = 0; i < n; ++i) used[i] = (!mask || mask[i]) && (!labels || labels[i] >= 0);
}

// Sums over the positives of an anchor whose denominators hold one positive and all negatives: Σ w · loss of the
// positive, and Σ w · share of the negatives in its denominator.
struct PositiveSums {
  Buffer<double> loss, rest;
};

template <typename T>
struct Problem {
  using A = acc_t<T>;
  InfoNceSizes size;
  InfoNceOptions options;
  double temperature;
  const int64_t *anchor_labels, *candidate_labels;
  const T* weights;
  std::vector<Side<A>> sides;  // anchors; candidates, then negatives
  std::vector<Term<A>> terms;

  // `offset`: the candidate that is anchor 0 itself; if it is given, the two sides are never the same. `known`: the
  // similarities have been computed before, see `keep`, and none is computed here.
  Problem(const char* op, const InfoNceInputs& in, const InfoNceSizes& size, const InfoNceOptions& options,
          std::optional<int64_t> offset = std::nullopt, bool known = false)
      : size(size),
        options(options),
        temperature(read_temperature(op, in, options)),
        anchor_labels(data_or_null<int64_t>(in.anchor_labels)),
        candidate_labels(data_or_null<int64_t>(in.candidate_labels)),
        weights(data_or_null<T>(in.weights)) {
    Term<A> term{};
    const int64_t all = size.candidates + size.negatives;
    term.rows.allocate(size.anchors);
    term.columns.allocate(all);
    mark_used(term.rows.used, data_or_null<bool>(in.anchor_mask), anchor_labels, size.anchors);
    mark_used(term.columns.used, data_or_null<bool>(in.candidate_mask), candidate_labels, size.candidates);
    mark_used(term.columns.used + size.candidates, data_or_null<bool>(in.negative_mask), nullptr, size.negatives);
    // An embedding with itself needs half the tiles, provided both roles are played by the same rows.
    const auto differ = [&](const auto* x, const auto* y) {
      return x && std::memcmp(x, y, size.anchors * sizeof(*x)) != 0;
    };
    const bool self = !in.candidates && !in.negatives && !weights && !offset &&
                      !differ(term.rows.used, term.columns.used) && !differ(anchor_labels, candidate_labels);
    sides.reserve(2);
    const Source<T> anchors{in.anchors.const_data_ptr<T>(), size.anchors, nullptr};
    using Right = typename Side<A>::Right;
    const bool in_pairs = takes_pairs<T>(std::min(size.anchors, all), size.width);
    const Right right = in_pairs ? Right::kPairs : known ? Right::kNone : Right::kPanels;
    sides.emplace_back(anchors, term.rows.used, size.anchors, size.width, options.normalize, right);
    if (!self)
      sides.emplace_back(Source<T>{in.candidates ? in.candidates->template const_data_ptr<T>() : anchors.first,
                                   size.candidates, data_or_null<T>(in.negatives)},
                         term.columns.used, all, size.width, options.normalize, right);
    term.a = &sides.front();
    term.b = &sides.back();
    term.scale = M_LOG2E / temperature;
    term.two_sided = options.symmetric && !self;
    term.diagonal = !anchor_labels && !weights && !options.exclude_self;
    term.exclude_self = options.exclude_self;
    term.offset = offset.value_or(0);
    terms.push_back(std::move(term));
    count(count_used(this->term().rows.used, size.anchors), count_used(this->term().columns.used, all));
  }

  // Sets how many anchors and candidates take part, including those of other parts of the batch.
  void count(int64_t anchors, int64_t candidates) {
    Term<A>& t = term();
    const auto partner = [&](const Direction<A>& other, int64_t n) {
      return [&t, &other, n](int64_t i) { return t.exclude_self && i >= 0 && i < n && other.used[i]; };
    };
    const auto of_row = partner(t.columns, size.candidates), of_column = partner(t.rows, size.anchors);
    count_candidates(t.rows, size.anchors, candidates, [&](int64_t i) { return of_row(i + t.offset); });
    count_candidates(t.columns, size.candidates, anchors, [&](int64_t j) { return of_column(j - t.offset); });
  }

  // Makes sweeps store the similarities at `kept` or, if `known`, read them there.
  void keep(A* kept, bool known) {
    term().kept = kept;
    term().known = known;
  }

  Term<A>& term() { return terms.front(); }
  const Term<A>& term() const { return terms.front(); }
  bool disjoint() const { return options.denominator != kAll; }
  Labels row_labels() const { return {anchor_labels, term().rows.used, size.anchors}; }
  Labels column_labels() const { return {candidate_labels, term().columns.used, size.candidates}; }

  // Calls visit(i, j, similarity in the tile, weight index) for the pairs of anchors and candidates that take part.
  template <typename Visit>
  void visit_pairs(const Tile<A>& tile, int64_t row, int64_t column, Visit&& visit) const {
    const int64_t columns = std::min(tile.n, size.candidates - column);
    for (int64_t i = 0; i < tile.m; ++i) {
      if (!takes_part(tile.exponent_bias_a[i])) continue;
      for (int64_t j = 0; j < columns; ++j) {
        if (!takes_part(tile.exponent_bias_b[j]) || (options.exclude_self && j == i + tile.diagonal)) continue;
        visit(row + i, column + j, tile.s[i * kTileRow + j], (row + i) * size.candidates + column + j);
      }
    }
  }

  // Calls visit(i, j, similarity in the tile, weight) for the pairs that are positive.
  template <typename Visit>
  void visit_positives(const Tile<A>& tile, int64_t row, int64_t column, Visit&& visit) const {
    if (weights)
      return visit_pairs(tile, row, column, [&](int64_t i, int64_t j, A& similarity, int64_t at) {
        const A weight = static_cast<A>(weights[at]);
        if (weight != 0) visit(i, j, similarity, static_cast<double>(weight));
      });
    if (anchor_labels)
      return visit_pairs(tile, row, column, [&](int64_t i, int64_t j, A& similarity, int64_t) {
        if (anchor_labels[i] == candidate_labels[j]) visit(i, j, similarity, 1.0);
      });
    if (!term().diagonal) return;
    for (int64_t i = 0; i < tile.m; ++i) {
      const int64_t j = i + tile.diagonal;
      if (j < 0 || j >= std::min(tile.n, size.candidates - column)) continue;
      if (takes_part(tile.exponent_bias_a[i]) && takes_part(tile.exponent_bias_b[j]))
        visit(row + i, column + j, tile.s[i * kTileRow + j], 1.0);
    }
  }

  static void hide(A& similarity) { similarity = -std::numeric_limits<A>::infinity(); }

  // Sums of exponentials over the denominators; totals and mean similarities of positives (of weighted ones their sums,
  // where not `mean`).
  void sum(const char* op, bool mean) {
    Term<A>& t = term();
    std::atomic<bool> negative{false};
    sum_exponentials(
        terms,
        [&](const Term<A>&, const Tile<A>& tile, int64_t row, int64_t column) {
          if (!weights) return;
          visit_pairs(tile, row, column, [&](int64_t i, int64_t j, A similarity, int64_t at) {
            const double weight = static_cast<double>(static_cast<A>(weights[at]));
            if (weight < 0) negative = true;
            t.rows.total[i] += weight;
            t.rows.positive[i] += weight * similarity;
            if (!t.two_sided) return;
            t.columns.total[j] += weight;
            t.columns.positive[j] += weight * similarity;
          });
        },
        [&](const Term<A>&, const Tile<A>& tile, int64_t row, int64_t column) {
          if (!disjoint()) return;
          visit_positives(tile, row, column, [](int64_t, int64_t, A& similarity, double) { hide(similarity); });
        });
    t.known = t.kept != nullptr;
    check(!negative, op, "expected `weights` to be at least 0, got a negative one");
    if (weights && mean) {
      for (int64_t i = 0; i < size.anchors; ++i)
        if (t.rows.total[i] != 0) t.rows.positive[i] /= t.rows.total[i];
      for (int64_t j = 0; j < size.candidates; ++j)
        if (t.columns.total[j] != 0) t.columns.positive[j] /= t.columns.total[j];
    }
    if (anchor_labels) {
      const Labels rows = row_labels(), columns = column_labels();
      class_positives(*t.a, rows, *t.b, columns, options.exclude_self, t.offset, t.rows);
      if (t.two_sided) class_positives(*t.b, columns, *t.a, rows, options.exclude_self, -t.offset, t.columns);
    }
  }

  // A positive against the negatives of an anchor whose softmax is loaded: its loss, and the softmax weight of the
  // negatives in its denominator.
  struct Against {
    double loss, rest;
  };
  Against against(const Direction<A>& direction, int64_t i, A similarity) const {
    const double scale = static_cast<double>(static_cast<A>(term().scale));
    const double log = direction.log[i];
    if (std::isinf(log)) return {0, 0};  // no negatives
    const double lead = ((static_cast<double>(similarity) - direction.shift[i]) * scale - log) * M_LN2;
    const double power = std::exp(-std::abs(lead));
    return {std::log1p(power) + std::max(0.0, -lead), (lead > 0 ? power : 1.0) / (1 + power)};
  }

  // Loads the weights of a direction in the gradient, from what the forward pass kept of its n anchors (null: no
  // anchors); gradient_of(i) is the gradient of the loss of anchor i.
  template <typename GradientOf>
  void load(Direction<A>& direction, const Side<A>& side, int64_t n, const A* stats, GradientOf&& gradient_of) const {
    load_shares(term(), direction, side, n, stats, !disjoint(), gradient_of, [&](int64_t i) {
      return options.denominator == kNegatives ? static_cast<double>(stats[kRest * n + i]) : 1.0;
    });
  }

  // A sweep over all tiles: the positives of the anchors whose softmax is loaded, against their negatives.
  void sum_positives(PositiveSums& rows, PositiveSums& columns) {
    const Term<A>& t = term();
    rows.loss = Buffer<double>(size.anchors, 0.0), rows.rest = Buffer<double>(size.anchors, 0.0);
    const int64_t others = t.two_sided ? size.candidates : 0;
    columns.loss = Buffer<double>(others, 0.0), columns.rest = Buffer<double>(others, 0.0);
    const auto add = [&](PositiveSums& sums, const Direction<A>& direction, int64_t i, A similarity, double weight) {
      const Against found = against(direction, i, similarity);
      sums.loss[i] += weight * found.loss;
      sums.rest[i] += weight * found.rest;
    };
    sweep(terms, [&](const Term<A>&, const Tile<A>& tile, int64_t row, int64_t column) {
      visit_positives(tile, row, column, [&](int64_t i, int64_t j, A similarity, double weight) {
        add(rows, t.rows, i, similarity, weight);
        if (t.self() && row != column) add(rows, t.rows, j, similarity, weight);
        if (t.two_sided) add(columns, t.columns, j, similarity, weight);
      });
    });
  }

  // Loads the logarithms of the denominators that `sum` has found.
  void load_softmax(Direction<A>& direction, int64_t rows, int64_t n) {
    for (A* part : {direction.shift, direction.log}) std::fill_n(part, rows, A(0));
    for (int64_t i = 0; i < n; ++i) {
      const contrastive::cpu::Denominator<A> all(term(), direction, i);
      direction.shift[i] = static_cast<A>(all.highest);
      direction.log[i] = static_cast<A>(all.log);
    }
  }

  // Gradients of the hidden positives of the tile that this thread works on, and where they belong.
  static std::vector<std::pair<A*, A>>& hidden_gradients() {
    thread_local std::vector<std::pair<A*, A>> hidden;
    return hidden;
  }

  // Gradients of all rows and of the weights, once `load` was called for rows and columns.
  void add_all_gradients(T* grad_weights) {
    Term<A>& t = term();
    for (Side<A>& side : sides) side.open_gradient();
    const bool against_negatives = options.denominator == kNegatives;
    const auto inspect = [&](const Term<A>&, const Tile<A>& tile, int64_t row, int64_t column) {
      if (weights)
        visit_pairs(tile, row, column, [&](int64_t i, int64_t j, A similarity, int64_t at) {
          double gradient = 0;
          if (!against_negatives) {
            gradient = t.rows.attract[i] * (t.rows.positive[i] - similarity) +
                       t.columns.attract[j] * (t.columns.positive[j] - similarity);
            gradient /= temperature;
          } else if (static_cast<A>(weights[at]) != 0) {
            gradient = t.rows.attract[i] * (against(t.rows, i, similarity).loss - t.rows.positive[i]);
            if (t.two_sided)
              gradient += t.columns.attract[j] * (against(t.columns, j, similarity).loss - t.columns.positive[j]);
          }
          grad_weights[at] = static_cast<T>(static_cast<A>(gradient));
        });
      if (!disjoint()) return;
      auto& hidden = hidden_gradients();
      hidden.clear();
      visit_positives(tile, row, column, [&](int64_t i, int64_t j, A& similarity, double weight) {
        if (against_negatives) {
          const Direction<A>& other = t.other();
          double pull = t.rows.attract[i] * against(t.rows, i, similarity).rest;
          if (t.self() || t.two_sided) pull += other.attract[j] * against(other, j, similarity).rest;
          hidden.push_back({&similarity, static_cast<A>(-weight * pull)});
        }
        hide(similarity);
      });
    };
    const auto adjust = [&](const Term<A>&, const Tile<A>& tile, int64_t row, int64_t column) {
      if (against_negatives) {
        for (const auto& [at, gradient] : hidden_gradients()) *at += gradient;
      } else if (weights) {
        visit_pairs(tile, row, column, [&](int64_t i, int64_t j, A& similarity, int64_t at) {
          similarity -= static_cast<A>(weights[at]) * (t.rows.attract[i] + t.columns.attract[j]);
        });
      }
    };
    add_gradients(terms, !against_negatives, inspect, adjust);
    if (!anchor_labels || against_negatives) return;
    const Labels rows = row_labels(), columns = column_labels();
    attract_classes(*t.a, rows, t.rows, *t.b, columns, t.other(), options.exclude_self, t.offset);
    if (!t.self()) attract_classes(*t.b, columns, t.columns, *t.a, rows, t.rows, options.exclude_self, -t.offset);
  }

  // Gradients of anchors, candidates (added to those of the anchors where `one_tensor`) and negatives; returns that of
  // the temperature.
  template <typename C>
  double project(T* grad_anchors, C* grad_candidates, C* grad_negatives, bool one_tensor) const {
    const A scale = static_cast<A>(1 / temperature);
    const Side<A>&a = *term().a, &b = *term().b;
    double pull = 0;
    if (term().self()) {
      pull = a.project(grad_anchors, scale, 0, a.n) / 2;
    } else if (!one_tensor) {
      pull = a.project(grad_anchors, scale, 0, a.n);
      b.project(grad_candidates, scale, 0, size.candidates);
    } else {
      pull = a.project(grad_anchors, scale, 0, a.n);
      project_both(grad_anchors, scale);
    }
    if (size.negatives) b.project(grad_negatives, scale, size.candidates, b.n);
    return -pull / (temperature * temperature);
  }

 private:
  // Gradients of rows that are both anchors and candidates, on two sides because their masks differ. The two gradients
  // are added before the division by the norm, which could turn them into infinities of opposite sign.
  template <typename Out>
  void project_both(Out* grad_x, A scale) const {
    const Side<A>&a = *term().a, &b = *term().b;
    parallel_for(0, a.n, Side<A>::grain(a.width), [&](int64_t begin, int64_t end) {
      const Buffer<A> sum(a.width);
      double pull;
      for (int64_t i = begin; i < end; ++i) {
        const bool anchor = a.inverse_norm[i] != 0, candidate = b.inverse_norm[i] != 0;
        for (int64_t k = 0; k < a.width; ++k)
          sum[k] = (anchor ? a.gradient[i * a.width + k] : A(0)) + (candidate ? b.gradient[i * b.width + k] : A(0));
        (anchor ? a : b).project_rows(sum.get(), grad_x + i * a.d, &pull, scale, i, i + 1);
      }
    });
  }
};

}  // namespace msacore::info_nce::cpu
