// Hierarchical contrastive loss on CUDA: checks, workspace and launches. Every launch takes as many terms or embeddings
// as fit, so that the nine terms of three modalities are four launches forward and four backward.
#include "hierarchical_contrastive.h"

#include <tuple>

#include "contrastive_launch.cuh"
#include "hierarchical_contrastive_kernels.cuh"

namespace msacore::hierarchical_contrastive {
namespace {

using contrastive::padded;
using contrastive::Problem;
using contrastive::Side;
using contrastive::Terms;

static_assert(Tiers::kCount == kTiers);

// The gradients of loss and tiers, null where there is none.
template <typename A>
struct Upstream {
  const A *loss, *tiers;
};

// The terms and embeddings of the loss, and the memory these live in once normalised.
template <typename T>
struct Workspace {
  using A = acc_t<T>;
  const Options& options;
  std::vector<Plan> plans;
  std::vector<Need> needs;  // of sides
  std::vector<Side<T>> sides;
  const int64_t* labels;
  const A* stats;  // null forward
  Upstream<A> upstream;
  int64_t n, rows;
  T* units;
  A *factors, *inverse_norms, *gradients;
  int64_t* counts;
  double* losses;
  Scratch scratch;

  Workspace(const Inputs& in, const Sizes& s, const Options& options, const A* stats, const Upstream<A>& upstream,
            cudaStream_t stream)
      : options(options),
        plans(plan_terms(s, options.intra_modal)),
        labels(in.labels ? in.labels->const_data_ptr<int64_t>() : nullptr),
        stats(stats),
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
          memory.take(inverse_norms, count * n);
          memory.take(counts, s.terms * 4);
          memory.take(losses, stats ? 0 : s.terms * 2 * n);
        }) {
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
      side.inverse_norm = inverse_norms + k * n;
      if (stats) side.gradient = gradients + before;
      sides.push_back(side);
      before += rows * width;
    }
    const std::vector<uint64_t> modalities = needs_of_sides(s);
    for (int64_t k = 0; k < count; ++k)  // a pair is in a term only where a third modality makes a second pair
      needs.push_back({modalities[k], k <= s.modalities ? 1 : 3});
    prepare({in.available ? in.available->const_data_ptr<bool>() : nullptr, s.modalities}, stream);
  }

  void prepare(const Availability& available, cudaStream_t stream) {
    const int64_t side_count = static_cast<int64_t>(sides.size()), term_count = static_cast<int64_t>(plans.size());
    int64_t side = 0, term = 0;
    while (side < side_count || term < term_count) {
      Preparation<T> p{};
      p.available = available;
      p.side_count = static_cast<int>(std::min<int64_t>(kSidesAtOnce, side_count - side));
      p.n = n;
      p.stats = stats ? stats + term * 6 * n : nullptr;
      p.counts = counts + term * 4;
      for (int k = 0; k < p.side_count; ++k, ++side) {
        p.sides[k] = sides[side];
        p.side_needs[k] = needs[side];
      }
      const int terms = static_cast<int>(std::min<int64_t>(kTermsAtOnce, term_count - term));
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
    const double temperature = options.temperatures[plan.tier];
    Problem<T> problem{};
    problem.a = sides[plan.first];
    problem.b = sides[plan.second];
    problem.a.partner = problem.b.factor;
    problem.b.partner = problem.a.factor;
    if (self) problem.a.labels = problem.b.labels = labels;
    problem.a.counts = counts + term * 4;
    problem.b.counts = problem.a.counts + 2;
    if (stats) {
      problem.a.stats = stats + term * 6 * n;
      problem.b.stats = self ? nullptr : problem.a.stats + 3 * n;
    }
    problem.temperature = {nullptr, contrastive::Temperature::kNumber, temperature};
    problem.both = !self;
    problem.exclude_self = self;
    problem.mean = true;
    problem.grad_out = upstream.loss;
    problem.grad_weight = options.tier_weights[plan.tier];
    problem.grad_term = upstream.tiers ? upstream.tiers + plan.tier : nullptr;
    problem.grad_scale = 1 / temperature;
    return problem;
  }

  // Calls body(terms, first, count) for groups of terms of which each takes `bytes` of the `memory` per tile of rows.
  template <typename Bytes, typename Body>
  void for_groups(Bytes&& bytes, int64_t memory, Body&& body) {
    const int64_t most = static_cast<int64_t>(plans.size());
    for (int64_t first = 0; first < most;) {
      Terms<T, kTermsAtOnce> terms;
      terms.at[0] = problem(first);
      const int64_t fitting = memory / std::max<int64_t>(1, bytes(terms.at[0]) * (rows / kTile));
      const int64_t count = std::min(most - first, std::clamp<int64_t>(fitting, 1, kTermsAtOnce));
      for (int64_t t = 1; t < count; ++t) terms.at[t] = problem(first + t);
      body(terms, first, static_cast<unsigned>(count));
      first += count;
    }
  }
};

template <typename T>
void forward(Workspace<T>& workspace, const Sizes& s, Tensor& loss, Tensor& tiers, Tensor& stats, cudaStream_t stream) {
  using A = acc_t<T>;
  const int64_t n = s.samples;
  A* const stat = stats.mutable_data_ptr<A>();
  double* const loss_of = workspace.losses;
  workspace.for_groups(contrastive::stats_bytes<T>, contrastive::kStatsBytes,
                       [&](const Terms<T, kTermsAtOnce>& terms, int64_t first, unsigned count) {
                         A* const rows = stat + first * 6 * n;
                         double* const row_losses = loss_of + first * 2 * n;
                         sum_statistics(terms, count, 2,
                                        contrastive::Results<A>{rows, rows + 3 * n, 6, row_losses, row_losses + n, 2},
                                        stats, stream);
                       });
  Tiers ends{};
  for (int64_t k = 0; k < kTiers; ++k) {
    ends.weight[k] = workspace.options.tier_weights[k];
    for (const Plan& plan : workspace.plans) ends.end[k] += plan.tier <= k;
  }
  launch(tiers_kernel<A>, dim3(1), dim3(kFinishThreads), 0, stream, loss_of, stat, n, ends, loss.mutable_data_ptr<A>(),
         tiers.mutable_data_ptr<A>());
}

// Two bfloat16 are as exact as the sums need, and the products run at half of their full speed.
template <typename T>
using KeptGradient =
    std::conditional_t<std::is_same_v<T, BFloat16>, contrastive::Kept<BFloat16, 2>, contrastive::Kept<acc_t<T>, 1>>;

template <typename T>
void backward(Workspace<T>& workspace, std::vector<Tensor>& grads, cudaStream_t stream) {
  std::vector<contrastive::Output<acc_t<T>>> outputs;
  for (const Side<T>& side : workspace.sides) outputs.push_back({side.gradient, side.rows, side.width});
  workspace.for_groups(contrastive::gradient_bytes<T, KeptGradient<T>>, contrastive::kGradientStripBytes,
                       [&](const Terms<T, kTermsAtOnce>& terms, int64_t first, unsigned count) {
                         contrastive::sum_gradients<kSidesAtOnce, KeptGradient<T>, T>(
                             terms, count, outputs, first > 0, nullptr, nullptr, grads.front(), stream);
                       });
  for (size_t first = 0; first < grads.size(); first += kSidesAtOnce) {
    contrastive::Projections<T, kSidesAtOnce> projections{};
    unsigned members = 0;
    for (size_t k = first; k < std::min(grads.size(), first + kSidesAtOnce); ++k)
      projections.at[members++] = {workspace.sides[k], workspace.sides[k], false, grads[k].mutable_data_ptr<T>()};
    launch(contrastive::project_kernel<T, kSidesAtOnce>, dim3(grid_for(workspace.n, kRowThreads / kWarp).x, members),
           dim3(kRowThreads), 0, stream, projections,
           contrastive::Temperature{nullptr, contrastive::Temperature::kNumber, 1});
  }
}

std::tuple<Tensor, Tensor, Tensor> forward_cuda(const std::vector<Tensor>& unimodal, const Tensor& fused,
                                                const std::vector<Tensor>& high_level, const OptionalTensor& available,
                                                const OptionalTensor& labels, const std::vector<double>& tier_weights,
                                                const std::vector<double>& temperatures, bool intra_modal) {
  constexpr const char* op = "hierarchical_contrastive_loss";
  const Inputs given{unimodal, fused, high_level, available, labels};
  const Options options{tier_weights, temperatures, intra_modal};
  const Sizes s = check_inputs(op, given, options);
  const OnDeviceOf device(fused);
  const Inputs in = contiguous(given);
  const ScalarType dtype = acc_dtype(fused.scalar_type());
  Tensor loss = torch::stable::new_empty(fused, {}, dtype);
  Tensor tiers = torch::stable::new_empty(fused, {kTiers}, dtype);
  Tensor stats = torch::stable::new_empty(fused, {s.terms, 2, 3, s.samples}, dtype);
  dispatch_floating(fused.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Workspace<T> workspace(in, s, options, nullptr, {nullptr, nullptr}, device.stream);
    forward(workspace, s, loss, tiers, stats, device.stream);
  });
  return {loss, tiers, stats};
}

// Gradients in the order of the arguments: unimodal, fused, high_level.
std::vector<Tensor> backward_cuda(const OptionalTensor& grad_loss, const OptionalTensor& grad_tiers,
                                  const std::vector<Tensor>& unimodal, const Tensor& fused,
                                  const std::vector<Tensor>& high_level, const OptionalTensor& available,
                                  const OptionalTensor& labels, const Tensor& stats_,
                                  const std::vector<double>& tier_weights, const std::vector<double>& temperatures,
                                  bool intra_modal) {
  constexpr const char* op = "hierarchical_contrastive_loss_backward";
  const Inputs given{unimodal, fused, high_level, available, labels};
  const Options options{tier_weights, temperatures, intra_modal};
  const Sizes s = check_inputs(op, given, options);
  check_saved(op, s, acc_dtype(fused.scalar_type()), grad_loss, grad_tiers, stats_);
  const OnDeviceOf device(fused);
  const Inputs in = contiguous(given);
  const Tensor stats = torch::stable::contiguous(stats_);
  const OptionalTensor tiers = contrastive::contiguous(grad_tiers);
  std::vector<Tensor> grads = new_gradients(in);
  dispatch_floating(fused.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const Upstream<A> upstream{contrastive::data_or_null<A>(grad_loss), contrastive::data_or_null<A>(tiers)};
    Workspace<T> workspace(in, s, options, stats.const_data_ptr<A>(), upstream, device.stream);
    backward(workspace, grads, device.stream);
  });
  return grads;
}

// The loss, and its gradients for a gradient of 1, in the order of the arguments.
std::tuple<Tensor, std::vector<Tensor>> with_gradients_cuda(const std::vector<Tensor>& unimodal, const Tensor& fused,
                                                            const std::vector<Tensor>& high_level,
                                                            const OptionalTensor& available,
                                                            const OptionalTensor& labels,
                                                            const std::vector<double>& tier_weights,
                                                            const std::vector<double>& temperatures, bool intra_modal) {
  const auto [loss, tiers, stats] =
      forward_cuda(unimodal, fused, high_level, available, labels, tier_weights, temperatures, intra_modal);
  const OnDeviceOf device(fused);
  Tensor one = torch::stable::new_empty(loss, {});
  torch::stable::fill_(one, 1);
  return {loss, backward_cuda(one, std::nullopt, unimodal, fused, high_level, available, labels, stats, tier_weights,
                              temperatures, intra_modal)};
}

}  // namespace
}  // namespace msacore::hierarchical_contrastive

MSACORE_CUDA_LIBRARY(m) {
  m.impl("hierarchical_contrastive_loss", TORCH_BOX(&msacore::hierarchical_contrastive::forward_cuda));
  m.impl("hierarchical_contrastive_loss_backward", TORCH_BOX(&msacore::hierarchical_contrastive::backward_cuda));
  m.impl("hierarchical_contrastive_loss_with_gradients",
         TORCH_BOX(&msacore::hierarchical_contrastive::with_gradients_cuda));
}
