// InfoNCE on CUDA: checks, scratch memory and launches.
#include "info_nce/info_nce.h"

#include "info_nce/info_nce_partial_cuda.cuh"
#include "info_nce/info_nce_pass.cuh"

namespace msacore::info_nce::cuda {
using namespace contrastive::cuda;
namespace {

template <bool Apart, typename T>
void sum_direction(const Pass<T>& pass, const AnchorResults<acc_t<T>>& rows, const AnchorResults<acc_t<T>>& columns,
                   const Tensor& like, cudaStream_t stream) {
  const Problem<T>& problem = pass.terms.at[0];
  const unsigned directions = problem.two_sided ? 2 : 1;
  if (pass.classes) pass.classes->sum_positives(pass.terms, 1, directions, rows, columns);
  sum_statistics<Apart>(pass.terms, 1, directions, rows, columns, like, stream);
  if (problem.denominator == Denominator::kNegatives)
    sum_against_negatives(pass.terms, 1, directions, rows, columns, like, stream);
}

void forward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
             InfoNceResults& results) {
  const OnDeviceOf device(in.anchors);
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    Pass<T> pass(op, in, s, options, nullptr, nullptr, nullptr, device.stream);
    pass.keep(results.kept);
    const Problem<T>& problem = pass.terms.at[0];
    const int64_t n = problem.a.n, column_anchors = problem.two_sided ? problem.b.n : 0;
    const int64_t stats = stat_rows(options.denominator);
    const AnchorResults<A> rows{results.anchor_stats.template mutable_data_ptr<A>(), stats, pass.losses, 1};
    const AnchorResults<A> columns{results.candidate_stats.template mutable_data_ptr<A>(), stats, pass.losses + n, 1};
    if (problem.denominator == Denominator::kAll) {
      sum_direction<false>(pass, rows, columns, in.anchors, device.stream);
    } else {
      sum_direction<true>(pass, rows, columns, in.anchors, device.stream);
    }
    launch(finish_kernel<A>, dim3(1), dim3(kFinishThreads), 0, device.stream, rows.losses, rows.stats, n,
           columns.losses, columns.stats, column_anchors, problem.two_sided, problem.gradient.mean,
           problem.gradient.per_anchor, results.loss.template mutable_data_ptr<A>());
  });
}

template <typename T>
void backward(const Pass<T>& pass, const InfoNceInputs& in, const InfoNceSizes& s, InfoNceGradients& grads,
              cudaStream_t stream) {
  using A = acc_t<T>;
  const Problem<T>& problem = pass.terms.at[0];
  const Side<T>&a = problem.a, &b = problem.b;
  const std::vector<Output<A>> outputs{{a.gradient, a.rows, a.width}, {b.gradient, b.rows, b.width}};
  T* const weights = problem.weights ? grads.weights.template mutable_data_ptr<T>() : nullptr;
  double* const slopes = in.learned_temperature ? pass.slopes : nullptr;
  if (problem.denominator == Denominator::kAll) {
    sum_gradients<2, KeptGradient<T>, false>(pass.terms, 1, outputs, false, weights, slopes, grads.anchors, stream);
  } else {
    sum_gradients<2, KeptGradient<T>, true>(pass.terms, 1, outputs, false, weights, slopes, grads.anchors, stream);
  }
  if (pass.classes) pass.classes->add_gradients(pass.terms, 1);
  const bool one_tensor = !in.candidates;
  Projections<T, 3> projections{};
  unsigned members = 0;
  projections.at[members++] = {a, b, one_tensor, grads.anchors.template mutable_data_ptr<T>()};
  if (in.candidates) projections.at[members++] = {b, b, false, grads.candidates.template mutable_data_ptr<T>()};
  if (in.negatives) {
    const Side<T> negatives = rows_from(b, b.n, s.negatives);
    projections.at[members++] = {negatives, negatives, false, grads.negatives.template mutable_data_ptr<T>()};
  }
  launch(project_kernel<T, 3, T>, dim3(grid_for(std::max({a.n, b.n, s.negatives}), kRowThreads / kWarp).x, members),
         dim3(kRowThreads), 0, stream, projections, problem.unit_rows);
  if (in.learned_temperature)  // not `slopes`, which may be null if there are no tiles
    launch(temperature_kernel, dim3(1), dim3(kSumThreads), 0, stream, pass.slopes,
           int64_t{tiles(a.rows)} * tiles(b.rows), problem.temperature,
           gradient_of(problem.temperature, grads.temperature));
}

InfoNceGradients backward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
                          const Tensor& grad_out, const Tensor& anchor_stats, const Tensor& candidate_stats,
                          const Tensor& kept) {
  const OnDeviceOf device(in.anchors);
  InfoNceGradients grads(in, s);
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    Pass<T> pass(op, in, s, options, anchor_stats.const_data_ptr<A>(),
                 options.symmetric ? candidate_stats.const_data_ptr<A>() : nullptr, grad_out.const_data_ptr<A>(),
                 device.stream);
    pass.keep(kept);
    backward(pass, in, s, grads, device.stream);
  });
  return grads;
}

using Operators = InfoNceOperators<forward, backward>;

}  // namespace
}  // namespace msacore::info_nce::cuda

MSACORE_CUDA_LIBRARY(m) {
  m.impl("info_nce", TORCH_BOX(&msacore::info_nce::cuda::Operators::info_nce));
  m.impl("info_nce_backward", TORCH_BOX(&msacore::info_nce::cuda::Operators::info_nce_backward));
  using Partial = msacore::info_nce::cuda::partial::Operators;
  m.impl("info_nce_partial", TORCH_BOX(&Partial::info_nce_partial));
  m.impl("info_nce_partial_positives", TORCH_BOX(&Partial::info_nce_partial_positives));
  m.impl("info_nce_partial_backward", TORCH_BOX(&Partial::info_nce_partial_backward));
}
