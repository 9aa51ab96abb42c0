// Sums over a part of the anchors, in a form that can be merged with those of other parts.
#pragma once
#include "contrastive/cuda/negatives_kernels.cuh"

namespace msacore::info_nce::cuda {
using namespace contrastive::cuda;

// Grid as for merge_kernel: highest similarity of the denominator (-inf: empty), its sum, Σ weight and
// Σ weight · similarity of each row, to stats [4, n].
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 3)
    write_sums_kernel(const __grid_constant__ Terms<T, 1> terms, const __grid_constant__ Merge<acc_t<T>> rows,
                      const __grid_constant__ Merge<acc_t<T>> columns) {
  using A = acc_t<T>;
  const Problem<T>& problem = terms.at[0];
  const Merge<A>& m = blockIdx.y == 1 ? columns : rows;
  const int64_t n = blockIdx.y == 1 ? problem.b.n : problem.a.n;
  const double scale = problem.temperature.template scale<A>();
  A* const out = m.results.stats;
  for (int64_t r = grid_thread(); r < m.n; r += grid_threads()) {
    const int64_t i = m.first + r;
    const Softmax<double> all = m.merge_parts(no_softmax<double>(), m.partial.softmax, m.running.softmax, 0, n, r,
                                              [&](auto& to, const auto& from) { merge(to, from, scale); });
    const Positives<double> positives = m.merge_positives(0, n, r);
    if (!m.end) continue;
    out[i] = all.sum == 0 ? kNothing<A> : static_cast<A>(all.highest);
    out[n + i] = static_cast<A>(all.sum);
    out[2 * n + i] = static_cast<A>(positives.total);
    out[3 * n + i] = static_cast<A>(positives.similarity);
  }
}

// The same after the second sweep: Σ weight · loss and Σ weight · share of the negatives, to stats [2, n].
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 3)
    write_positives_kernel(const __grid_constant__ Terms<T, 1> terms, const __grid_constant__ Merge<acc_t<T>> rows,
                           const __grid_constant__ Merge<acc_t<T>> columns, acc_t<T>* __restrict__ of_rows,
                           acc_t<T>* __restrict__ of_columns) {
  using A = acc_t<T>;
  const Merge<A>& m = blockIdx.y == 1 ? columns : rows;
  const int64_t n = blockIdx.y == 1 ? terms.at[0].b.n : terms.at[0].a.n;
  A* const out = blockIdx.y == 1 ? of_columns : of_rows;
  for (int64_t r = grid_thread(); r < m.n; r += grid_threads()) {
    const Positives<double> sum = m.merge_positives(0, n, r);
    if (!m.end) continue;
    out[m.first + r] = static_cast<A>(sum.similarity);
    out[n + m.first + r] = static_cast<A>(sum.total);
  }
}

}  // namespace msacore::info_nce::cuda
