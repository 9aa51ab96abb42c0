// Hierarchical contrastive loss on CUDA: checks, scratch memory and launches. Few samples take one launch forward and
// one backward; with many samples, every launch takes all the terms or embeddings that fit.
#include "core/round.h"
#include "hierarchical_contrastive/hierarchical_contrastive.h"

#include "contrastive/cuda/classes.cuh"
#include "contrastive/cuda/launch.cuh"
#include "hierarchical_contrastive/hierarchical_contrastive_few_kernels.cuh"
#include "hierarchical_contrastive/hierarchical_contrastive_kernels.cuh"

namespace msacore::hierarchical_contrastive::cuda {
using namespace contrastive::cuda;
namespace {

static_assert(Tiers::kCount == kTiers);

// The gradients of loss and tiers, null where there is none.
template <typename A>
struct Upstream {
  const A *loss, *tiers;

  // The gradient of a direction's mean loss, for terms with one direction or with two.
  LossGradient<A> of_tier(const Options& options, int64_t tier, bool two_sided) const {
    LossGradient<A> gradient{};
    gradient.out = gradient.column_out = loss;
    gradient.term = tiers ? tiers + tier : nullptr;
    gradient.weight = options.tier_weights[tier];
    gradient.scale = two_sided ? 0.5 : 1;
    gradient.mean = true;
    return gradient;
  }
};

Tiers tiers_of(const std::vector<Plan>& plans, const Options& options) {
  Tiers tiers{};
  for (int64_t k = 0; k < kTiers; ++k) {
    tiers.weight[k] = options.tier_weights[k];
    for (const Plan& plan : plans) tiers.end[k] += plan.tier <= k;
  }
  return tiers;
}

std::vector<Need> needs_of(const Sizes& s) {
  std::vector<Need> needs;
  for (uint64_t modalities : needs_of_sides(s))  // a pair is in a term only where a third modality makes a second pair
    needs.push_back({modalities, static_cast<int64_t>(needs.size()) <= s.modalities ? 1 : 3});
  return needs;
}

// The terms and embeddings of the loss, and the memory that the normalised embeddings live in.
template <typename T>
struct Pass {
  using A = acc_t<T>;
  const Options& options;
  std::vector<Plan> plans;
  std::vector<Need> needs;  // of the sides
  std::vector<Side<T>> sides;
  Temperature temperatures[kTiers];
  const int64_t* labels;
  const A* stats;  // null in the forward pass
  KeptSimilarities<A> kept;
  Upstream<A> upstream;
  int64_t n, rows;
  T* units;
  A *factors, *gradients;
  InverseNorm<A>* inverse_norms;
  int64_t* counts;
  double* losses;
  Scratch scratch;
  std::optional<Classes> classes;  // where positives of equal label are sums over classes

  Pass(const char* op, const Inputs& in, const Sizes& s, const Options& options, const A* stats, const Tensor& kept,
       const Upstream<A>& upstream, cudaStream_t stream)
      : options(options),
        plans(plan_terms(s, options.intra_modal)),
        needs(needs_of(s)),
        labels(in.labels ? in.labels->const_data_ptr<int64_t>() : nullptr),
        stats(stats),
        kept(kept_similarities<A>(kept)),
        upstream(upstream),
        n(s.samples),
        rows(padded(s.samples, kTile)),
        scratch(in.fused, [&](Scratch& memory) {
          const int64_t d = in.fused.size(1), d3 = in.high_level.empty() ? 0 : in.high_level[0].size(1);
          const int64_t count = s.modalities + 1 + s.pairs;
          const int64_t numbers = rows * ((s.modalities + 1) * padded(d, 32) + s.pairs * padded(d3, 32));
          memory.take(units, numbers);
          memory.take(gradients, stats ? numbers : 0);
          memory.take(factors, count * rows);
          memory.take(inverse_norms, count * rows);
          memory.take(counts, s.terms * 4);
          memory.take(losses, stats ? 0 : s.terms * 2 * n);
        }) {
    for (int64_t k = 0; k < kTiers; ++k)
      temperatures[k] = temperature_of(op, in.learned_temperatures[k], options.temperatures[k]);
    const std::vector<Tensor> embeddings = in.embeddings();
    const int64_t count = static_cast<int64_t>(embeddings.size());
    int64_t before = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t d = embeddings[k].size(1), width = padded(d, 32);
      Side<T> side{};
      side.x = embeddings[k].template const_data_ptr<T>();
      side.n = n;
      side.d = d;
      side.rows = rows;
      side.width = width;
      side.unit = units + before;
      side.factor = factors + k * rows;
      side.inverse_norm = inverse_norms + k * rows;
      if (stats) side.gradient = gradients + before;
      sides.push_back(side);
      before += rows * width;
    }
    if (options.intra_modal && by_classes(labels, n, n)) classes.emplace(labels, n, labels, n, in.fused, stream);
    prepare({in.available ? in.available->const_data_ptr<bool>() : nullptr, s.modalities}, stream);
  }

  void prepare(const Availability& available, cudaStream_t stream) {
    const int64_t side_count = static_cast<int64_t>(sides.size()), term_count = static_cast<int64_t>(plans.size());
    int64_t side = 0, term = 0;
    while (side < side_count || term < term_count) {
      Preparation<T> p{};
      p.available = available;
      p.side_count = static_cast<int>(std::min<int64_t>(group_size(kSidesAtOnce), side_count - side));
      p.n = n;
      p.normalize = options.normalize;
      p.stats = stats ? stats + term * 8 * n : nullptr;
      p.counts = counts + term * 4;
      for (int k = 0; k < p.side_count; ++k, ++side) {
        p.sides[k] = sides[side];
        p.side_needs[k] = needs[side];
      }
      const int terms = static_cast<int>(std::min<int64_t>(group_size(kTermsAtOnce), term_count - term));
      for (int t = 0; t < terms; ++t, ++term) {
        const Plan& plan = plans[term];
        p.term_needs[t] = {needs[plan.first].modalities | needs[plan.second].modalities, 0};
        p.labels[t] = plan.first == plan.second ? labels : nullptr;
      }
      const unsigned blocks = std::max(1u, grid_for(rows, kRowThreads / kWarp).x);
      launch(prepare_kernel<T>, dim3(blocks, p.side_count + terms), dim3(kRowThreads), 0, stream, p);
    }
  }

  Problem<T> problem(int64_t term) {
    const Plan& plan = plans[term];
    const bool self = plan.first == plan.second;
    Problem<T> problem{};
    problem.a = sides[plan.first];
    problem.b = sides[plan.second];
    problem.a.partner = problem.b.factor;
    problem.b.partner = problem.a.factor;
    if (self) problem.a.labels = problem.b.labels = labels;
    problem.a.counts = counts + term * 4;
    problem.b.counts = problem.a.counts + 2;
    if (stats) {
      problem.a.stats = stats + term * 8 * n;
      problem.b.stats = self ? nullptr : problem.a.stats + 4 * n;
    }
    problem.temperature = temperatures[plan.tier];
    problem.unit_rows = options.normalize;
    problem.two_sided = !self;
    problem.exclude_self = self;
    problem.pairwise = self && !classes;
    problem.gradient = upstream.of_tier(options, plan.tier, problem.two_sided);
    problem.kept = kept.of_term(term);
    problem.kept_rows = problem.kept_columns = kept.rows;
    return problem;
  }

  // Calls body(terms, first, count) for groups of terms that fit into `memory`; each term takes bytes(term) per tile of
  // rows.
  template <typename Bytes, typename Body>
  void for_groups(Bytes&& bytes, int64_t memory, Body&& body) {
    const int64_t most = static_cast<int64_t>(plans.size());
    for (int64_t first = 0; first < most;) {
      Terms<T, kTermsAtOnce> terms;
      terms.at[0] = problem(first);
      const int64_t fitting = memory / std::max<int64_t>(1, bytes(terms.at[0]) * (rows / kTile));
      const int64_t count = std::min(most - first, std::clamp<int64_t>(fitting, 1, group_size(kTermsAtOnce)));
      for (int64_t t = 1; t < count; ++t) terms.at[t] = problem(first + t);
      body(terms, first, static_cast<unsigned>(count));
      first += count;
    }
  }
};

template <typename T>
void forward(Pass<T>& pass, const Sizes& s, Tensor& loss, Tensor& tiers, Tensor& stats, cudaStream_t stream) {
  using A = acc_t<T>;
  const int64_t n = s.samples;
  A* const stat = stats.mutable_data_ptr<A>();
  double* const loss_of = pass.losses;
  pass.for_groups(stats_bytes<T>, kStatsBytes, [&](const Terms<T, kTermsAtOnce>& terms, int64_t first, unsigned count) {
    A* const stats_of = stat + first * 8 * n;
    double* const losses_of = loss_of + first * 2 * n;
    const AnchorResults<A> rows{stats_of, 8, losses_of, 2}, columns{stats_of + 4 * n, 8, losses_of + n, 2};
    if (pass.classes) pass.classes->sum_positives(terms, count, 2, rows, columns);
    sum_statistics<false>(terms, count, 2, rows, columns, stats, stream);
  });
  launch(tiers_kernel<A>, dim3(1), dim3(kFinishThreads), 0, stream, loss_of, stat, n,
         tiers_of(pass.plans, pass.options), loss.mutable_data_ptr<A>(), tiers.mutable_data_ptr<A>());
}

// Two bfloat16 are as exact as the sums need, and the products run at half of their full speed.
template <typename T>
using KeptGradient = std::conditional_t<std::is_same_v<T, BFloat16>, Kept<BFloat16, 2>, Kept<acc_t<T>, 1>>;

bool any_learned(const Inputs& in) {
  return std::any_of(in.learned_temperatures, in.learned_temperatures + kTiers,
                     [](const OptionalTensor& learned) { return learned.has_value(); });
}

// The gradients of learned temperatures, from the slopes of the terms.
template <typename T>
void temperature_gradients(const Pass<T>& pass, const double* term_slopes, Gradients& grads, cudaStream_t stream) {
  const Tiers tiers = tiers_of(pass.plans, pass.options);
  for (int64_t k = 0; k < kTiers; ++k) {
    const Temperature& temperature = pass.temperatures[k];
    if (temperature.kind == Temperature::kNumber) continue;
    const int64_t begin = k > 0 ? tiers.end[k - 1] : 0;
    launch(temperature_kernel, dim3(1), dim3(kSumThreads), 0, stream, term_slopes + begin, tiers.end[k] - begin,
           temperature, gradient_of(temperature, grads.temperatures[k]));
  }
}

template <typename T>
void backward(Pass<T>& pass, const Inputs& in, Gradients& grads, cudaStream_t stream) {
  std::vector<Output<acc_t<T>>> outputs;
  for (const Side<T>& side : pass.sides) outputs.push_back({side.gradient, side.rows, side.width});
  const int64_t in_term = int64_t{tiles(pass.rows)} * tiles(pass.rows);
  const bool learned = any_learned(in);
  double *slopes = nullptr, *term_slopes = nullptr;
  const Scratch scratch(in.fused, [&](Scratch& memory) {
    if (learned) memory.take(slopes, kTermsAtOnce * in_term);
    if (learned) memory.take(term_slopes, static_cast<int64_t>(pass.plans.size()));
  });
  pass.for_groups(gradient_bytes<T, KeptGradient<T>>, kGradientStripBytes,
                  [&](const Terms<T, kTermsAtOnce>& terms, int64_t first, unsigned count) {
                    sum_gradients<kSidesAtOnce, KeptGradient<T>, false>(
                        terms, count, outputs, first > 0, static_cast<T*>(nullptr), slopes, in.fused, stream);
                    if (learned)
                      launch(slope_kernel, dim3(count), dim3(kSumThreads), 0, stream, slopes, in_term,
                             term_slopes + first);
                    if (pass.classes) pass.classes->add_gradients(terms, count);
                  });
  if (learned) temperature_gradients(pass, term_slopes, grads, stream);
  const std::vector<Tensor>& embeddings = grads.embeddings;
  for (size_t first = 0; first < embeddings.size(); first += group_size(kSidesAtOnce)) {
    Projections<T, kSidesAtOnce> projections{};
    unsigned members = 0;
    for (size_t k = first; k < std::min(embeddings.size(), first + group_size(kSidesAtOnce)); ++k)
      projections.at[members++] = {pass.sides[k], pass.sides[k], false, embeddings[k].mutable_data_ptr<T>()};
    launch(project_kernel<T, kSidesAtOnce, T>, dim3(grid_for(pass.n, kRowThreads / kWarp).x, members),
           dim3(kRowThreads), 0, stream, projections, pass.options.normalize);
  }
}

#ifndef MSACORE_SMALL_SIZES
constexpr int64_t kFewSamples = 512;  // a block meets all rows of a side: with more, prepared rows and larger tiles pay
#else
constexpr int64_t kFewSamples = 144;  // small, so that even small inputs have many samples
#endif

bool are_few(const Sizes& s) {
  return s.samples <= limit_from("MSACORE_CUDA_FEW_SAMPLES", kFewSamples) && s.terms <= kFewTerms &&
         s.modalities + 1 + s.pairs <= kFewSides;
}

// The gradients of a block's rows lie this far apart in shared memory.
template <typename T>
int64_t few_stride(const FewInputs<T>& few) {
  return padded(std::max(few.width, few.pair_width), 8);
}

template <typename T>
bool fits(const FewInputs<T>& few) {
  constexpr int64_t kBeside = 16 << 10;  // more than the kernel's static shared memory
  return few_backward_bytes<T>(few_stride(few)) + kBeside <= static_cast<int64_t>(shared_limit());
}

template <typename T>
FewInputs<T> few_inputs(const char* op, const Inputs& in, const Sizes& s, const Options& options) {
  FewInputs<T> few{};
  const std::vector<Tensor> embeddings = in.embeddings();
  const std::vector<Need> needs = needs_of(s);
  few.by_four = true;
  for (size_t k = 0; k < embeddings.size(); ++k) {
    few.x[k] = embeddings[k].template const_data_ptr<T>();
    few.needs[k] = needs[k];
    few.by_four = few.by_four && embeddings[k].size(1) % 4 == 0 &&
                  reinterpret_cast<uintptr_t>(few.x[k]) % sizeof(Vector<T, 4>) == 0;
  }
  few.available = {in.available ? in.available->const_data_ptr<bool>() : nullptr, s.modalities};
  few.labels = data_or_null<int64_t>(in.labels);
  few.n = static_cast<int>(s.samples);
  few.width = static_cast<int>(in.fused.size(1));
  few.pair_width = in.high_level.empty() ? 0 : static_cast<int>(in.high_level[0].size(1));
  few.pairs = static_cast<int>(s.modalities) + 1;
  few.side_count = static_cast<int>(embeddings.size());
  for (const Plan& plan : plan_terms(s, options.intra_modal))
    few.terms[few.term_count++] = {static_cast<uint8_t>(plan.tier),
                                   {static_cast<uint8_t>(plan.first), static_cast<uint8_t>(plan.second)}};
  few.normalize = options.normalize;
  for (int64_t k = 0; k < kTiers; ++k)
    few.temperature[k] = temperature_of(op, in.learned_temperatures[k], options.temperatures[k]);
  return few;
}

template <typename T>
unsigned few_tiles(const FewInputs<T>& few) {
  return static_cast<unsigned>(ceil_div(few.n, kFewRows));
}

template <typename T>
void few_forward(const FewInputs<T>& few, const Tiers& tiers, Results& results, cudaStream_t stream) {
  using A = acc_t<T>;
  FewForward<A> to{};
  to.tiers = tiers;
  to.stats = results.stats.mutable_data_ptr<A>();
  to.kept = kept_similarities<A>(results.kept);
  to.loss = results.loss.mutable_data_ptr<A>();
  to.of_tiers = results.tiers.mutable_data_ptr<A>();
  const dim3 grid(std::max(1u, few_tiles(few)), 2 * few.term_count);
  const Scratch scratch(results.loss, [&](Scratch& memory) {
    memory.take(to.sums, int64_t{grid.x} * grid.y);
    memory.take(to.done, 1);
  });
  clear_memory(to.done, sizeof(unsigned), stream);
  launch(few_forward_kernel<T>, grid, dim3(kRowThreads), FewStages<T>::kBytes, stream, few, to);
}

template <typename T>
void few_backward(const FewInputs<T>& few, const Inputs& in, const Options& options, const Tensor& stats,
                  const Tensor& kept, const Upstream<acc_t<T>>& upstream, Gradients& grads, cudaStream_t stream) {
  FewBackward<T> to{};
  to.stats = stats.const_data_ptr<acc_t<T>>();
  to.kept = kept_similarities<acc_t<T>>(kept);
  for (int64_t k = 0; k < kTiers; ++k) {
    to.gradient[k] = upstream.of_tier(options, k, k > 0 || !options.intra_modal);
    to.temperature_gradient[k] = gradient_of(few.temperature[k], grads.temperatures[k]);
  }
  for (size_t k = 0; k < grads.embeddings.size(); ++k) to.grads[k] = grads.embeddings[k].template mutable_data_ptr<T>();
  to.stride = static_cast<int>(few_stride(few));
  const dim3 grid(std::max(1u, few_tiles(few)), few.side_count);
  const bool learned = any_learned(in);
  const Scratch scratch(in.fused, [&](Scratch& memory) {
    if (learned) memory.take(to.slopes, int64_t{grid.x} * grid.y * kTiers);
    if (learned) memory.take(to.done, 1);
  });
  if (learned) clear_memory(to.done, sizeof(unsigned), stream);
  launch(few_backward_kernel<T>, grid, dim3(kRowThreads), few_backward_bytes<T>(to.stride), stream, few, to);
}

void forward(const char* op, const Inputs& in, const Sizes& s, const Options& options, Results& results) {
  const OnDeviceOf device(in.fused);
  dispatch_floating(in.fused.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (are_few(s))
      return few_forward(few_inputs<T>(op, in, s, options), tiers_of(plan_terms(s, options.intra_modal), options),
                         results, device.stream);
    Pass<T> pass(op, in, s, options, nullptr, results.kept, {}, device.stream);
    forward(pass, s, results.loss, results.tiers, results.stats, device.stream);
  });
}

void backward(const char* op, const Inputs& in, const Sizes& s, const Options& options, const OptionalTensor& grad_loss,
              const OptionalTensor& grad_tiers, const Tensor& stats, const Tensor& kept, Gradients& grads) {
  const OnDeviceOf device(in.fused);
  dispatch_floating(in.fused.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const Upstream<A> upstream{data_or_null<A>(grad_loss), data_or_null<A>(grad_tiers)};
    if (are_few(s)) {
      const FewInputs<T> few = few_inputs<T>(op, in, s, options);
      if (fits(few)) return few_backward(few, in, options, stats, kept, upstream, grads, device.stream);
    }
    Pass<T> pass(op, in, s, options, stats.const_data_ptr<A>(), kept, upstream, device.stream);
    backward(pass, in, grads, device.stream);
  });
}

using Operators = HierarchicalOperators<forward, backward>;

}  // namespace
}  // namespace msacore::hierarchical_contrastive::cuda

MSACORE_CUDA_LIBRARY(m) {
  m.impl("hierarchical_contrastive_loss",
         TORCH_BOX(&msacore::hierarchical_contrastive::cuda::Operators::hierarchical_contrastive_loss));
  m.impl("hierarchical_contrastive_loss_backward",
         TORCH_BOX(&msacore::hierarchical_contrastive::cuda::Operators::hierarchical_contrastive_loss_backward));
}
