// InfoNCE of a part of the anchors on CUDA, in one translation unit with InfoNCE of all anchors, so that the kernels of
// both are compiled once.
#pragma once
#include "info_nce/info_nce_partial.h"

#include "info_nce/info_nce_partial_kernels.cuh"
#include "info_nce/info_nce_pass.cuh"

namespace msacore::info_nce::cuda::partial {
namespace {

// Statistics of rows or columns that exist already, in the form that sweeps take.
template <typename A>
AnchorResults<A> at_hand(const A* stats) {
  return {const_cast<A*>(stats), 0, nullptr, 0};
}

template <bool Apart, typename T>
void sweep(const Pass<T>& pass, PartialRows& out, const Tensor& like, cudaStream_t stream) {
  using A = acc_t<T>;
  const auto results = [](Tensor& t) { return AnchorResults<A>{t.mutable_data_ptr<A>(), 0, nullptr, 0}; };
  const AnchorResults<A> rows = results(out.row), columns = results(out.column);
  sum_strips(
      pass.terms, 1, pass.terms.at[0].two_sided ? 2 : 1, true, true, rows, columns, like,
      [&](int64_t first, dim3 grid, const Parts<A>& of_rows, const Parts<A>& of_columns) {
        launch(statistics_kernel<T, 1, Apart>, grid, dim3(kTileThreads), kSimilarityBytes<T>, stream, pass.terms, first,
               of_rows, of_columns, rows, columns);
      },
      [&](const Merge<A>& of_rows, const Merge<A>& of_columns, dim3 grid) {
        launch(write_sums_kernel<T>, grid, dim3(kRowThreads), 0, stream, pass.terms, of_rows, of_columns);
      });
}

void forward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
             int64_t diagonal, PartialRows& rows) {
  const OnDeviceOf device(in.anchors);
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const PartOfBatch<acc_t<T>> part{diagonal, {}, {}, {}};
    const Pass<T> pass(op, in, s, options, nullptr, nullptr, nullptr, device.stream, &part);
    if (options.denominator == info_nce::kAll) {
      sweep<false>(pass, rows, in.anchors, device.stream);
    } else {
      sweep<true>(pass, rows, in.anchors, device.stream);
    }
  });
}

void positives(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
               int64_t diagonal, const Tensor& row_negatives, const Tensor& column_negatives, PartialRows& out) {
  const OnDeviceOf device(in.anchors);
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const PartOfBatch<A> part{diagonal, {}, {}, {}};
    const Pass<T> pass(op, in, s, options, nullptr, nullptr, nullptr, device.stream, &part);
    const AnchorResults<A> rows = at_hand(row_negatives.const_data_ptr<A>()),
                           columns = at_hand(column_negatives.const_data_ptr<A>());
    sum_strips(
        pass.terms, 1, pass.terms.at[0].two_sided ? 2 : 1, false, true, rows, columns, in.anchors,
        [&](int64_t first, dim3 grid, const Parts<A>& of_rows, const Parts<A>& of_columns) {
          launch(against_negatives_kernel<T, 1>, grid, dim3(kTileThreads), kSimilarityBytes<T>, device.stream,
                 pass.terms, first, of_rows, of_columns, rows, columns);
        },
        [&](const Merge<A>& of_rows, const Merge<A>& of_columns, dim3 grid) {
          launch(write_positives_kernel<T>, grid, dim3(kRowThreads), 0, device.stream, pass.terms, of_rows, of_columns,
                 out.row.template mutable_data_ptr<A>(), out.column.template mutable_data_ptr<A>());
        });
  });
}

template <typename T>
void project(const Pass<T>& pass, const InfoNceSizes& s, PartialGradients& grads, cudaStream_t stream) {
  using A = acc_t<T>;
  const Problem<T>& problem = pass.terms.at[0];
  const Side<T>&a = problem.a, &b = problem.b, negatives = rows_from(b, b.n, s.negatives);
  const Projections<T, 1, T> of_anchors{{{a, a, false, grads.anchors.template mutable_data_ptr<T>()}}};
  const Projections<T, 2, A> of_candidates{
      {{b, b, false, grads.candidates.template mutable_data_ptr<A>()},
       {negatives, negatives, false, grads.negatives.template mutable_data_ptr<A>()}}};
  launch(project_kernel<T, 1, T>, dim3(grid_for(a.n, kRowThreads / kWarp).x, 1), dim3(kRowThreads), 0, stream,
         of_anchors, problem.unit_rows);
  launch(project_kernel<T, 2, A>, dim3(grid_for(std::max(b.n, s.negatives), kRowThreads / kWarp).x, 2),
         dim3(kRowThreads), 0, stream, of_candidates, problem.unit_rows);
}

void backward(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
              int64_t diagonal, const PartialSaved& saved, PartialGradients& grads) {
  const OnDeviceOf device(in.anchors);
  dispatch_floating(in.anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const PartOfBatch<A> part{
        diagonal,
        {saved.anchors_used.const_data_ptr<int64_t>(), saved.candidates_used.const_data_ptr<int64_t>()},
        {saved.row_scale.const_data_ptr<A>(), saved.column_scale.const_data_ptr<A>()},
        {saved.row_scale.dim() == 1, saved.column_scale.dim() == 1}};
    const Pass<T> pass(op, in, s, options, saved.row_stats.const_data_ptr<A>(),
                       options.symmetric ? saved.column_stats.const_data_ptr<A>() : nullptr, part.scale[0],
                       device.stream, &part);
    const Problem<T>& problem = pass.terms.at[0];
    const Side<T>&a = problem.a, &b = problem.b;
    const std::vector<Output<A>> outputs{{a.gradient, a.rows, a.width}, {b.gradient, b.rows, b.width}};
    T* const weights = problem.weights ? grads.weights.template mutable_data_ptr<T>() : nullptr;
    sum_gradients<2, KeptGradient<T>, true>(pass.terms, 1, outputs, false, weights, pass.slopes, grads.anchors,
                                            device.stream);
    project(pass, s, grads, device.stream);
    constexpr Temperature::Kind kind = std::is_same_v<A, double> ? Temperature::kDouble : Temperature::kFloat;
    launch(temperature_kernel, dim3(1), dim3(kSumThreads), 0, device.stream, pass.slopes,
           int64_t{tiles(a.rows)} * tiles(b.rows), problem.temperature,
           TemperatureGradient{grads.temperature.template mutable_data_ptr<A>(), kind});
  });
}

using Operators = InfoNcePartialOperators<forward, positives, backward>;

}  // namespace
}  // namespace msacore::info_nce::cuda::partial
