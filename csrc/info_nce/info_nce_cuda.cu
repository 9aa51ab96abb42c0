// InfoNCE on CUDA: checks, workspace and launches.
#include "info_nce/info_nce.h"

#include "contrastive/cuda/classes.cuh"
#include "contrastive/cuda/launch.cuh"
#include "info_nce/info_nce_kernels.cuh"

namespace msacore::info_nce::cuda {
using namespace contrastive::cuda;
namespace {

Temperature temperature_of(const char* op, const InfoNceInputs& in, const InfoNceOptions& options) {
  if (!in.learned_temperature) return {nullptr, Temperature::kNumber, options.temperature};
  return dispatch_floating(in.learned_temperature->scalar_type(), op, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr Temperature::Kind kind = std::is_same_v<S, float>    ? Temperature::kFloat
                                       : std::is_same_v<S, double> ? Temperature::kDouble
                                       : std::is_same_v<S, Half>   ? Temperature::kHalf
                                                                   : Temperature::kBFloat16;
    return Temperature{in.learned_temperature->const_data_ptr<S>(), kind, 0};
  });
}

// The loss as one term, and the memory its two sides live in.
template <typename T>
struct Workspace {
  using A = acc_t<T>;
  T *anchor_units, *candidate_units;
  A *anchor_factors, *candidate_factors, *anchor_norms, *candidate_norms, *anchor_gradients, *candidate_gradients;
  int64_t* counts;
  double *losses, *slopes;
  Scratch scratch;
  Terms<T, 1> terms;
  std::optional<Classes> classes;  // where positives are sums over them

  // Backward, `row_stats` are those of the forward pass; `column_stats` is null where columns are no anchors.
  Workspace(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
            const A* row_stats, const A* column_stats, const A* grad_out, cudaStream_t stream)
      : scratch(in.anchors, [&](Scratch& memory) {
          const int64_t width = padded(s.width, 32), n = padded(s.anchors, kTile), m = padded(s.candidates, kTile);
          memory.take(anchor_units, n * width);
          memory.take(candidate_units, m * width);
          memory.take(anchor_factors, n);
          memory.take(candidate_factors, m);
          memory.take(anchor_norms, s.anchors);
          memory.take(candidate_norms, s.candidates);
          memory.take(counts, 4);
          memory.take(losses, grad_out ? 0 : s.anchors + s.candidates);
          memory.take(anchor_gradients, grad_out ? n * width : 0);
          memory.take(candidate_gradients, grad_out ? m * width : 0);
          memory.take(slopes, grad_out ? int64_t{tiles(n)} * tiles(m) : 0);
        }) {
    const Tensor& candidates = in.candidates ? *in.candidates : in.anchors;
    const auto side = [&](const Tensor& x, const OptionalTensor& labels, int64_t size) {
      Side<T> side{};
      side.x = x.const_data_ptr<T>();
      side.n = size;
      side.d = s.width;
      side.rows = padded(size, kTile);
      side.width = padded(s.width, 32);
      side.labels = data_or_null<int64_t>(labels);
      return side;
    };
    Problem<T>& problem = terms.at[0];
    problem = {};
    problem.a = side(in.anchors, in.anchor_labels, s.anchors);
    problem.a.unit = anchor_units;
    problem.a.factor = anchor_factors;
    problem.a.inverse_norm = anchor_norms;
    problem.a.gradient = anchor_gradients;
    problem.a.counts = counts;
    problem.a.stats = row_stats;
    problem.b = side(candidates, in.candidate_labels, s.candidates);
    problem.b.unit = candidate_units;
    problem.b.factor = candidate_factors;
    problem.b.inverse_norm = candidate_norms;
    problem.b.gradient = candidate_gradients;
    problem.b.counts = counts + 2;
    problem.b.stats = column_stats;
    problem.temperature = temperature_of(op, in, options);
    problem.weights = data_or_null<T>(in.weights);
    problem.both = options.symmetric;
    problem.exclude_self = options.exclude_self;
    if (by_classes(problem.a.labels, s.anchors, s.candidates))
      classes.emplace(problem.a.labels, s.anchors, problem.b.labels, s.candidates, in.anchors, stream);
    // Asked of the arguments: without rows their pointers may be null.
    problem.pairwise = in.weights || (in.anchor_labels && !classes);
    problem.gradient.out = grad_out;
    problem.gradient.weight = 1;
    problem.gradient.scale = problem.both ? 0.5 : 1;
    problem.gradient.mean = options.reduction == kMean;
    problem.gradient.per_anchor = options.reduction == kNone;
    const unsigned blocks = grid_for(std::max(problem.a.rows, problem.b.rows), kRowThreads / kWarp).x;
    launch(
        prepare_kernel<T>, dim3(blocks + 1, 2), dim3(kRowThreads), 0, stream,
        Roles<T>{{problem.a, problem.b}, {data_or_null<bool>(in.anchor_mask), data_or_null<bool>(in.candidate_mask)}});
  }
};

template <typename T>
void forward(const Workspace<T>& workspace, InfoNceResults& results, cudaStream_t stream) {
  using A = acc_t<T>;
  const Problem<T>& problem = workspace.terms.at[0];
  const int64_t n = problem.a.n, column_anchors = problem.both ? problem.b.n : 0;
  double *const row_losses = workspace.losses, *const column_losses = row_losses + n;
  A *const rows = results.anchor_stats.template mutable_data_ptr<A>(), *const columns =
                                                                           results.candidate_stats
                                                                               .template mutable_data_ptr<A>();
  const AnchorResults<A> of_rows{rows, 4, row_losses, 1}, of_columns{columns, 4, column_losses, 1};
  const unsigned directions = problem.both ? 2 : 1;
  if (workspace.classes) workspace.classes->sum_positives(workspace.terms, 1, directions, of_rows, of_columns);
  sum_statistics(workspace.terms, 1, directions, of_rows, of_columns, results.anchor_stats, stream);
  launch(finish_kernel<A>, dim3(1), dim3(kFinishThreads), 0, stream, row_losses, rows, n, column_losses, columns,
         column_anchors, problem.both, problem.gradient.mean, problem.gradient.per_anchor,
         results.loss.template mutable_data_ptr<A>());
}

void refuse_what_is_to_come(const char* op, const InfoNceInputs& in, const InfoNceOptions& options) {
  check(!in.negatives && options.normalize && options.denominator == kAll, op,
        "`negatives`, `denominator` and `normalize` are not implemented on CUDA");
}

void forward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
             InfoNceResults& results) {
  refuse_what_is_to_come(op, in, options);
  const OnDeviceOf device(in.anchors);
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    forward(Workspace<T>(op, in, s, options, nullptr, nullptr, nullptr, device.stream), results, device.stream);
  });
}

// Gradients of similarities in memory: bfloat16 where the rows are, so that the products run at full speed; float32 for
// float16, whose range would not do.
template <typename T>
using KeptGradient = Kept<std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, acc_t<T>>, 1>;

template <typename T>
void backward(const Workspace<T>& workspace, InfoNceGradients& grads, bool one_tensor, const char* op,
              cudaStream_t stream) {
  using A = acc_t<T>;
  const Problem<T>& problem = workspace.terms.at[0];
  const Side<T>&a = problem.a, &b = problem.b;
  const std::vector<Output<A>> outputs{{a.gradient, a.rows, a.width}, {b.gradient, b.rows, b.width}};
  sum_gradients<2, KeptGradient<T>>(workspace.terms, 1, outputs, false,
                                    problem.weights ? grads.weights.template mutable_data_ptr<T>() : nullptr,
                                    workspace.slopes, grads.anchors, stream);
  if (workspace.classes) workspace.classes->add_gradients(workspace.terms, 1);
  const Projections<T, 2> projections{{{a, b, one_tensor, grads.anchors.template mutable_data_ptr<T>()},
                                       {b, b, false, grads.candidates.template mutable_data_ptr<T>()}}};
  launch(project_kernel<T, 2>, dim3(grid_for(std::max(a.n, b.n), kRowThreads / kWarp).x, one_tensor ? 1 : 2),
         dim3(kRowThreads), 0, stream, projections, problem.temperature);
  if (problem.temperature.kind == Temperature::kNumber) return;
  dispatch_floating(grads.temperature.scalar_type(), op, [&](auto tag) {
    using S = typename decltype(tag)::type;
    launch(temperature_kernel<S>, dim3(1), dim3(kFinishThreads), 0, stream, workspace.slopes,
           int64_t{tiles(a.rows)} * tiles(b.rows), problem.temperature,
           grads.temperature.template mutable_data_ptr<S>());
  });
}

InfoNceGradients backward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
                          const Tensor& grad_out, const Tensor& anchor_stats, const Tensor& candidate_stats) {
  refuse_what_is_to_come(op, in, options);
  const OnDeviceOf device(in.anchors);
  InfoNceGradients grads(in, s);
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const Workspace<T> workspace(op, in, s, options, anchor_stats.const_data_ptr<A>(),
                                 options.symmetric ? candidate_stats.const_data_ptr<A>() : nullptr,
                                 grad_out.const_data_ptr<A>(), device.stream);
    backward(workspace, grads, !in.candidates, op, device.stream);
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
