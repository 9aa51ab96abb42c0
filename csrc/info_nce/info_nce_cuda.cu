// InfoNCE on CUDA: checks, workspace and launches.
#include "info_nce/info_nce.h"

#include "contrastive/cuda/classes.cuh"
#include "contrastive/cuda/launch.cuh"
#include "info_nce/info_nce_kernels.cuh"

namespace msacore::info_nce::cuda {
using namespace contrastive::cuda;
using contrastive::cuda::Denominator;  // info_nce::Denominator holds the operator's codes
namespace {

Denominator denominator_of(const InfoNceOptions& options) {
  return options.denominator == info_nce::kAll         ? Denominator::kAll
         : options.denominator == info_nce::kNegatives ? Denominator::kNegatives
                                                       : Denominator::kDecoupled;
}

// The loss as one term, and the memory its two sides live in. The negatives of all anchors lie behind the candidates.
template <typename T>
struct Workspace {
  using A = acc_t<T>;
  T* units[2];
  A *factors[2], *gradients[2];
  InverseNorm<A>* norms[2];
  int64_t* counts;
  double *losses, *slopes;
  Scratch scratch;
  Terms<T, 1> terms;
  std::optional<Classes> classes;  // where positives are sums over them

  // Backward, `row_stats` are those of the forward pass; `column_stats` is null where columns are no anchors.
  Workspace(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
            const A* row_stats, const A* column_stats, const A* grad_out, cudaStream_t stream)
      : scratch(in.anchors, [&](Scratch& memory) {
          const int64_t width = padded(s.width, 32);
          const int64_t rows[2] = {padded(s.anchors, kTile), padded(s.candidates + s.negatives, kTile)};
          for (int r = 0; r < 2; ++r) {
            memory.take(units[r], rows[r] * width);
            memory.take(factors[r], rows[r]);
            memory.take(norms[r], rows[r]);
            memory.take(gradients[r], grad_out ? rows[r] * width : 0);
          }
          memory.take(counts, 4);
          memory.take(losses, grad_out ? 0 : s.anchors + s.candidates);
          memory.take(slopes, grad_out && in.learned_temperature ? int64_t{tiles(rows[0])} * tiles(rows[1]) : 0);
        }) {
    const auto side = [&](int r, const Tensor& x, const OptionalTensor& labels, int64_t negatives, const A* stats) {
      Side<T> side{};
      side.x = x.const_data_ptr<T>();
      side.n = x.size(0);
      side.d = s.width;
      side.rows = padded(side.n + negatives, kTile);
      side.width = padded(s.width, 32);
      side.unit = units[r];
      side.factor = factors[r];
      side.inverse_norm = norms[r];
      side.gradient = gradients[r];
      side.labels = data_or_null<int64_t>(labels);
      side.counts = counts + 2 * r;
      side.stats = stats;
      return side;
    };
    Problem<T>& problem = terms.at[0];
    problem = {};
    problem.a = side(0, in.anchors, in.anchor_labels, 0, row_stats);
    problem.b = side(1, in.candidates ? *in.candidates : in.anchors, in.candidate_labels, s.negatives, column_stats);
    problem.temperature = temperature_of(op, in.learned_temperature, options.temperature);
    problem.weights = data_or_null<T>(in.weights);
    problem.both = options.symmetric;
    problem.exclude_self = options.exclude_self;
    problem.unit_rows = options.normalize;
    problem.denominator = denominator_of(options);
    const bool apart = problem.denominator != Denominator::kAll;
    if (!apart && by_classes(problem.a.labels, s.anchors, s.candidates))
      classes.emplace(problem.a.labels, s.anchors, problem.b.labels, s.candidates, in.anchors, stream);
    // Asked of the arguments: without rows their pointers may be null.
    problem.pairwise = apart || in.weights || (in.anchor_labels && !classes);
    problem.gradient.out = grad_out;
    problem.gradient.weight = 1;
    problem.gradient.scale = problem.both ? 0.5 : 1;
    problem.gradient.mean = options.reduction == kMean;
    problem.gradient.per_anchor = options.reduction == kNone;
    const Roles<T> roles{{problem.a, problem.b},
                         {data_or_null<bool>(in.anchor_mask), data_or_null<bool>(in.candidate_mask)},
                         data_or_null<T>(in.negatives),
                         data_or_null<bool>(in.negative_mask),
                         s.negatives,
                         options.normalize};
    const unsigned blocks = grid_for(std::max(problem.a.rows, problem.b.rows), kRowThreads / kWarp).x;
    launch(prepare_kernel<T>, dim3(blocks + 1, 2), dim3(kRowThreads), 0, stream, roles);
  }
};

template <bool Apart, typename T>
void sum_direction(const Workspace<T>& workspace, const AnchorResults<acc_t<T>>& rows,
                   const AnchorResults<acc_t<T>>& columns, const Tensor& like, cudaStream_t stream) {
  const Problem<T>& problem = workspace.terms.at[0];
  const unsigned directions = problem.both ? 2 : 1;
  if (workspace.classes) workspace.classes->sum_positives(workspace.terms, 1, directions, rows, columns);
  sum_statistics<Apart>(workspace.terms, 1, directions, rows, columns, like, stream);
  if (problem.denominator == Denominator::kNegatives)
    sum_against_negatives(workspace.terms, 1, directions, rows, columns, like, stream);
}

void forward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
             InfoNceResults& results) {
  const OnDeviceOf device(in.anchors);
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const Workspace<T> workspace(op, in, s, options, nullptr, nullptr, nullptr, device.stream);
    const Problem<T>& problem = workspace.terms.at[0];
    const int64_t n = problem.a.n, column_anchors = problem.both ? problem.b.n : 0;
    const int64_t stats = stat_rows(options.denominator);
    const AnchorResults<A> rows{results.anchor_stats.template mutable_data_ptr<A>(), stats, workspace.losses, 1};
    const AnchorResults<A> columns{results.candidate_stats.template mutable_data_ptr<A>(), stats, workspace.losses + n,
                                   1};
    if (problem.denominator == Denominator::kAll) {
      sum_direction<false>(workspace, rows, columns, in.anchors, device.stream);
    } else {
      sum_direction<true>(workspace, rows, columns, in.anchors, device.stream);
    }
    launch(finish_kernel<A>, dim3(1), dim3(kFinishThreads), 0, device.stream, rows.losses, rows.stats, n,
           columns.losses, columns.stats, column_anchors, problem.both, problem.gradient.mean,
           problem.gradient.per_anchor, results.loss.template mutable_data_ptr<A>());
  });
}

// Gradients of similarities in memory: bfloat16 where the rows are, so that the products run at full speed; float32 for
// float16, whose range would not do.
template <typename T>
using KeptGradient = Kept<std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, acc_t<T>>, 1>;

// The rows of a side from `first` on, as far as project_kernel reads them.
template <typename T>
Side<T> rows_from(Side<T> side, int64_t first, int64_t count) {
  side.n = count;
  side.unit += first * side.width;
  side.factor += first;
  side.inverse_norm += first;
  side.gradient += first * side.width;
  return side;
}

template <typename T>
void backward(const Workspace<T>& workspace, const InfoNceInputs& in, const InfoNceSizes& s, InfoNceGradients& grads,
              cudaStream_t stream) {
  using A = acc_t<T>;
  const Problem<T>& problem = workspace.terms.at[0];
  const Side<T>&a = problem.a, &b = problem.b;
  const std::vector<Output<A>> outputs{{a.gradient, a.rows, a.width}, {b.gradient, b.rows, b.width}};
  T* const weights = problem.weights ? grads.weights.template mutable_data_ptr<T>() : nullptr;
  double* const slopes = in.learned_temperature ? workspace.slopes : nullptr;
  if (problem.denominator == Denominator::kAll) {
    sum_gradients<2, KeptGradient<T>, false>(workspace.terms, 1, outputs, false, weights, slopes, grads.anchors,
                                             stream);
  } else {
    sum_gradients<2, KeptGradient<T>, true>(workspace.terms, 1, outputs, false, weights, slopes, grads.anchors, stream);
  }
  if (workspace.classes) workspace.classes->add_gradients(workspace.terms, 1);
  const bool one_tensor = !in.candidates;
  Projections<T, 3> projections{};
  unsigned members = 0;
  projections.at[members++] = {a, b, one_tensor, grads.anchors.template mutable_data_ptr<T>()};
  if (in.candidates) projections.at[members++] = {b, b, false, grads.candidates.template mutable_data_ptr<T>()};
  if (in.negatives) {
    const Side<T> negatives = rows_from(b, b.n, s.negatives);
    projections.at[members++] = {negatives, negatives, false, grads.negatives.template mutable_data_ptr<T>()};
  }
  launch(project_kernel<T, 3>, dim3(grid_for(std::max({a.n, b.n, s.negatives}), kRowThreads / kWarp).x, members),
         dim3(kRowThreads), 0, stream, projections, problem.unit_rows);
  if (in.learned_temperature)  // the slopes of no tile may be at no address
    launch(temperature_kernel, dim3(1), dim3(kSumThreads), 0, stream, workspace.slopes,
           int64_t{tiles(a.rows)} * tiles(b.rows), problem.temperature,
           gradient_of(problem.temperature, grads.temperature));
}

InfoNceGradients backward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
                          const Tensor& grad_out, const Tensor& anchor_stats, const Tensor& candidate_stats) {
  const OnDeviceOf device(in.anchors);
  InfoNceGradients grads(in, s);
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const Workspace<T> workspace(op, in, s, options, anchor_stats.const_data_ptr<A>(),
                                 options.symmetric ? candidate_stats.const_data_ptr<A>() : nullptr,
                                 grad_out.const_data_ptr<A>(), device.stream);
    backward(workspace, in, s, grads, device.stream);
  });
  return grads;
}

using Operators = InfoNceOperators<forward, backward>;

}  // namespace
}  // namespace msacore::info_nce::cuda

MSACORE_CUDA_LIBRARY(m) {
  m.impl("info_nce", TORCH_BOX(&msacore::info_nce::cuda::Operators::info_nce));
  m.impl("info_nce_backward", TORCH_BOX(&msacore::info_nce::cuda::Operators::info_nce_backward));
}
