// Hierarchical contrastive loss on the CPU: all terms of the three tiers in one sweep forward and one backward; every
// embedding is normalised once.
#include "hierarchical_contrastive/hierarchical_contrastive.h"

#include <torch/csrc/stable/library.h>

#include "contrastive/cpu/anchors.h"
#include "contrastive/cpu/classes.h"
#include "contrastive/cpu/few.h"

namespace msacore::hierarchical_contrastive::cpu {
using namespace contrastive::cpu;
namespace {

double read_temperature(const char* op, const Tensor& learned, int64_t tier) {
  const double value = dispatch_floating(learned.scalar_type(), op, [&](auto tag) {
    using S = typename decltype(tag)::type;
    return static_cast<double>(static_cast<acc_t<S>>(*learned.const_data_ptr<S>()));
  });
  check_temperature(op, ("temperatures[" + std::to_string(tier) + "]").c_str(), value);
  return value;
}

template <typename T>
struct Problem {
  using A = acc_t<T>;
  Sizes size;
  Options options;
  bool learned = false;  // whether any temperature is
  bool few;              // terms are single tiles, whose exponentials are kept instead of similarities (few.h)
  const int64_t* labels;
  std::vector<Plan> plans;
  std::vector<Side<A>> sides;
  std::vector<Term<A>> terms;

  // `kept`: the exponentials or similarities have been kept, and no similarity is computed again.
  Problem(const char* op, const Inputs& in, const Sizes& size, const Options& options, bool kept)
      : size(size),
        options(options),
        labels(in.labels ? in.labels->const_data_ptr<int64_t>() : nullptr),
        plans(plan_terms(size, options.intra_modal)) {
    for (int64_t k = 0; k < kTiers; ++k) {
      if (!in.learned_temperatures[k]) continue;
      learned = true;
      this->options.temperatures[k] = read_temperature(op, *in.learned_temperatures[k], k);
    }
    const int64_t n = size.samples;
    const std::vector<Tensor> embeddings = in.embeddings();
    const std::vector<uint64_t> needs = needs_of_sides(size);
    const bool* available = in.available ? in.available->const_data_ptr<bool>() : nullptr;
    std::vector<uint64_t> present(n, ~uint64_t(0));
    for (int64_t i = 0; available && i < n; ++i)
      for (int64_t m = 0; m < size.modalities; ++m)
        if (!available[i * size.modalities + m]) present[i] &= ~(uint64_t(1) << m);

    const Buffer<uint8_t> used(embeddings.size() * n, 0);  // rows of the sides that some term reads
    for (const Plan& plan : plans) {
      Term<A> term{};
      const bool self = plan.first == plan.second;
      const uint64_t need = needs[plan.first] | needs[plan.second];
      term.rows.allocate(n);
      term.columns.allocate(n);
      for (int64_t i = 0; i < n; ++i) {
        const uint8_t open = (present[i] & need) == need && (!self || labels[i] >= 0);
        term.rows.used[i] = term.columns.used[i] = open;
        used[plan.first * n + i] |= open;
        used[plan.second * n + i] |= open;
      }
      term.scale = M_LOG2E / this->options.temperatures[plan.tier];
      term.two_sided = term.diagonal = !self;
      term.exclude_self = self;
      const int64_t part = count_used(term.rows.used, n);
      for (Direction<A>* direction : {&term.rows, &term.columns})
        count_candidates(*direction, n, part, [&](int64_t i) { return self && term.rows.used[i]; });
      terms.push_back(std::move(term));
    }
    sides.reserve(embeddings.size());
    using Right = typename Side<A>::Right;
    const bool one_tile = padded(n) <= kBlock;
    const auto bounded = [](const Term<A>& term) { return is_bounded<A>(term.scale); };
    few = one_tile && !options.intra_modal && options.normalize && std::all_of(terms.begin(), terms.end(), bounded);
    kept = kept && !(few && learned);
    for (const Tensor& t : embeddings) {
      const bool in_pairs = !one_tile && takes_pairs<T>(n, t.size(1));
      const Right right = in_pairs ? Right::kPairs : kept ? Right::kNone : Right::kPanels;
      sides.emplace_back(n, t.size(1), options.normalize, right);
    }
    const int64_t panels = padded(n) / kPanel;
    parallel_for(0, panels * static_cast<int64_t>(sides.size()), Side<A>::grain(kPanel * sides.front().width),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t k = i / panels, panel = i % panels;
                     const Source<T> x{embeddings[k].template const_data_ptr<T>(), n, nullptr};
                     sides[k].fill(x, used.get() + k * n, panel, panel + 1);
                   }
                 });
    for (size_t t = 0; t < plans.size(); ++t) {
      terms[t].a = &sides[plans[t].first];
      terms[t].b = &sides[plans[t].second];
    }
  }

  Labels labels_of(const Term<A>& term) const { return {labels, term.rows.used, size.samples}; }

  template <typename V>
  V* stats_of(V* stats, size_t t, bool columns) const {
    return stats + (2 * t + columns) * kStats * size.samples;
  }

  // What a term adds to its tier, once its sums are complete. Fills stats [2, 4, N] of the term.
  double loss_of(size_t t, A* stats) const {
    const Term<A>& term = terms[t];
    double loss = 0;
    for (const bool columns : {false, true}) {
      int64_t count = 0;
      const std::vector<double> losses = anchor_losses(term, columns ? term.other() : term.rows, size.samples, false,
                                                       stats_of(stats, t, columns), &count);
      loss += std::accumulate(losses.begin(), losses.end(), 0.0) / (2.0 * std::max<int64_t>(1, count));
    }
    return loss;
  }

  void load(size_t t, const double* grad_tiers, const A* stats) {
    Term<A>& term = terms[t];
    const int64_t tier = plans[t].tier;
    const double factor = grad_tiers[tier] / options.temperatures[tier] / (term.self() ? 1 : 2);
    const auto load_direction = [&](Direction<A>& direction, const Side<A>& side, const A* of_direction) {
      const double gradient =
          factor / static_cast<double>(std::max<int64_t>(1, count_anchors(of_direction, size.samples)));
      load_shares(
          term, direction, side, size.samples, of_direction, true, [&](int64_t) { return gradient; },
          [](int64_t) { return 1.0; });
    };
    load_direction(term.rows, *term.a, stats_of(stats, t, false));
    if (!term.self()) load_direction(term.columns, *term.b, stats_of(stats, t, true));
  }

  void add_up(const std::vector<double>& losses, A* tiers) const {
    double sums[kTiers] = {};
    for (size_t t = 0; t < plans.size(); ++t) sums[plans[t].tier] += losses[t];
    for (int64_t k = 0; k < kTiers; ++k) tiers[k] = static_cast<A>(sums[k]);
  }

  // Fills tiers [3] and stats [T, 2, 4, N]; `kept` as in kept_shape, or null.
  void forward(A* tiers, A* stats, A* kept) {
    std::vector<double> losses(terms.size());
    if (few) {
      sum_few_exponentials(terms, kept, [&](int64_t t) { losses[t] = loss_of(t, stats); });
      return add_up(losses, tiers);
    }
    keep_similarities(kept, false);
    sum_exponentials(terms, [](const auto&...) {}, [](const auto&...) {});
    for (size_t t = 0; t < terms.size(); ++t) {
      Term<A>& term = terms[t];
      if (term.self()) {
        const Labels classes = labels_of(term);
        class_positives(*term.a, classes, *term.a, classes, true, 0, term.rows);
      }
      losses[t] = loss_of(t, stats);
    }
    add_up(losses, tiers);
  }

  // Fills the gradients of the embeddings, and `slopes` [3] where temperatures are learned.
  void backward(const double* grad_tiers, const A* stats, const A* kept, const std::vector<T*>& grads, double* slopes) {
    for (size_t t = 0; t < terms.size(); ++t) load(t, grad_tiers, stats);
    if (kept && !learned && few) return FewGradients<A>(terms, kept).project(sides, grads);
    keep_similarities(const_cast<A*>(kept), true);
    for (Side<A>& side : sides) side.open_gradient();
    // Per term and row: Σ over pairs of similarity · its gradient.
    std::vector<Buffer<double>> pulls;
    for (const Term<A>& term : terms) pulls.emplace_back(learned ? term.a->rows : 0, 0.0);
    const auto copy_similarities = [&](const Term<A>&, const Tile<A>& tile, int64_t, int64_t) {
      if (learned) std::copy(tile.s, tile.s + tile.m * kTileRow, similarities());
    };
    const auto add_pulls = [&](const Term<A>& term, const Tile<A>& tile, int64_t row, int64_t column) {
      if (!learned) return;
      const double share = term.self() && row == column ? 0.5 : 1.0;  // both orders of a pair are in one tile
      const Buffer<double>& pull = pulls[&term - terms.data()];
      for (int64_t i = 0; i < tile.m; ++i)
        pull[row + i] += share * dot_rows(tile.s + i * kTileRow, similarities() + i * kTileRow, tile.n);
    };
    add_gradients(terms, true, copy_similarities, add_pulls);
    for (Term<A>& term : terms) {
      if (!term.self()) continue;
      const Labels classes = labels_of(term);
      attract_classes(*term.a, classes, term.rows, *term.a, classes, term.rows, true, 0);
    }
    for (size_t k = 0; k < sides.size(); ++k) sides[k].project(grads[k], A(1), 0, sides[k].n);
    if (learned) add_slopes(stats, pulls, slopes);
  }

 private:
  // Makes sweeps store the similarities at `kept` or, if `known`, read them there; does nothing where `kept` is null or
  // holds exponentials.
  void keep_similarities(A* kept, bool known) {
    if (!kept || few) return;
    for (Term<A>& term : terms) {
      term.kept = kept;
      term.known = known;
      kept += term.a->rows * term.b->rows;
    }
  }

  // Similarities of the tile that this thread works on.
  static A* similarities() {
    thread_local const Buffer<A> tile(kBlock * kTileRow);
    return tile.get();
  }

  // Gradients of the temperatures, from the pulls of pairs in tiles and those of positives of equal label.
  void add_slopes(const A* stats, const std::vector<Buffer<double>>& pulls, double* slopes) const {
    std::fill(slopes, slopes + kTiers, 0.0);
    for (size_t t = 0; t < terms.size(); ++t) {
      const Term<A>& term = terms[t];
      double pull = 0;
      for (int64_t i = 0; i < size.samples; ++i) {
        pull += pulls[t][i];
        if (term.self())
          pull -= term.rows.attract[i] * term.rows.positive[i] * stats_of(stats, t, false)[3 * size.samples + i];
      }
      slopes[plans[t].tier] -= pull / options.temperatures[plans[t].tier];
    }
  }
};

template <typename A>
A weighted(const std::vector<double>& tier_weights, const A* tiers) {
  double total = 0;
  for (int64_t k = 0; k < kTiers; ++k) total += tier_weights[k] * static_cast<double>(tiers[k]);
  return static_cast<A>(total);
}

template <typename T>
std::vector<T*> data_of(std::vector<Tensor>& tensors) {
  std::vector<T*> data;
  for (Tensor& t : tensors) data.push_back(t.mutable_data_ptr<T>());
  return data;
}

void forward(const char* op, const Inputs& in, const Sizes& s, const Options& options, Results& results) {
  dispatch_floating(in.fused.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    A* sums = results.tiers.template mutable_data_ptr<A>();
    Problem<T>(op, in, s, options, false)
        .forward(sums, results.stats.template mutable_data_ptr<A>(), kept_data<A>(results.kept));
    *results.loss.template mutable_data_ptr<A>() = weighted(options.tier_weights, sums);
  });
}

void backward(const char* op, const Inputs& in, const Sizes& s, const Options& options, const OptionalTensor& grad_loss,
              const OptionalTensor& grad_tiers, const Tensor& stats, const Tensor& kept, Gradients& grads) {
  dispatch_floating(in.fused.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    double gradient[kTiers], slopes[kTiers] = {};
    for (int64_t k = 0; k < kTiers; ++k)
      gradient[k] = (grad_loss ? options.tier_weights[k] * static_cast<double>(*grad_loss->const_data_ptr<A>()) : 0.0) +
                    (grad_tiers ? static_cast<double>(grad_tiers->const_data_ptr<A>()[k]) : 0.0);
    Problem<T>(op, in, s, options, kept.numel() > 0)
        .backward(gradient, stats.const_data_ptr<A>(), kept_data<A>(kept), data_of<T>(grads.embeddings), slopes);
    for (int64_t k = 0; k < kTiers; ++k) {
      if (!in.learned_temperatures[k]) continue;
      dispatch_floating(grads.temperatures[k].scalar_type(), op, [&](auto other) {
        using S = typename decltype(other)::type;
        *grads.temperatures[k].template mutable_data_ptr<S>() = static_cast<S>(static_cast<acc_t<S>>(slopes[k]));
      });
    }
  });
}

using Operators = HierarchicalOperators<forward, backward>;

}  // namespace
}  // namespace msacore::hierarchical_contrastive::cpu

#define MSACORE_HIERARCHICAL_ARGUMENTS                                                        \
  "Tensor[] unimodal, Tensor fused, Tensor[] high_level, Tensor? available, Tensor? labels, " \
  "Tensor? learned_temperature_1, Tensor? learned_temperature_2, Tensor? learned_temperature_3"
#define MSACORE_HIERARCHICAL_OPTIONS "*, float[] tier_weights, float[] temperatures, bool intra_modal, bool normalize"

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def("hierarchical_contrastive_loss(" MSACORE_HIERARCHICAL_ARGUMENTS ", " MSACORE_HIERARCHICAL_OPTIONS
        ", bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("hierarchical_contrastive_loss_backward(Tensor? grad_loss, Tensor? grad_tiers, " MSACORE_HIERARCHICAL_ARGUMENTS
        ", Tensor stats, Tensor kept, " MSACORE_HIERARCHICAL_OPTIONS ") -> (Tensor[], Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  m.impl("hierarchical_contrastive_loss",
         TORCH_BOX(&msacore::hierarchical_contrastive::cpu::Operators::hierarchical_contrastive_loss));
  m.impl("hierarchical_contrastive_loss_backward",
         TORCH_BOX(&msacore::hierarchical_contrastive::cpu::Operators::hierarchical_contrastive_loss_backward));
}
