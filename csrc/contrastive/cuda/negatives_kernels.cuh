// Denominators that hold one positive each besides all negatives, on CUDA: a second sweep, once the statistics of the
// negatives are known.
#pragma once
#include "contrastive/cuda/kernels.cuh"

namespace msacore::contrastive::cuda {

// What the second sweep needs of anchor i, as in its gradients; `attract` is 1 for an anchor and 0 for other rows.
template <typename A>
__device__ __forceinline__ AnchorGradient<A> anchor_against(const A* stats, int64_t n, int64_t i) {
  if (i >= n) return no_anchor<A>();
  return {0, stats[kHighest * n + i], static_cast<A>(stats[kLog * n + i] * kLog2E), 1, 0};
}

// Grid as for statistics_kernel. For rows and columns: Σ weight · share of the negatives, in place of Σ weight, and
// Σ weight · loss, in place of Σ weight · similarity.
template <typename T, int Most>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 8 ? 2 : 3)
    against_negatives_kernel(const __grid_constant__ Terms<T, Most> terms, int64_t first,
                             const __grid_constant__ Parts<acc_t<T>> of_rows,
                             const __grid_constant__ Parts<acc_t<T>> of_columns,
                             const __grid_constant__ AnchorResults<acc_t<T>> row_results,
                             const __grid_constant__ AnchorResults<acc_t<T>> column_results) {
  using A = acc_t<T>;
  const Problem<T>& problem = terms.at[blockIdx.z];
  MSACORE_SHARED(a, TileSide<A>);
  MSACORE_SHARED(b, TileSide<A>);
  MSACORE_SHARED(rows, AnchorGradient<A>[kTile]);
  MSACORE_SHARED(columns, AnchorGradient<A>[kTile]);
  MSACORE_SHARED(row_sums, TileStats<Positives<A>>);
  MSACORE_SHARED(column_sums, TileStats<Positives<A>>);
  const int64_t row = first + int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  const int r = thread_in_block() % kTile;
  const auto load_anchor = [&](const AnchorResults<A>& results, int64_t n, int64_t i) {
    return anchor_against(results.of_term(blockIdx.z, n).stats, n, i);
  };
  if (thread_in_block() < kTile) {
    rows[r] = load_anchor(row_results, problem.a.n, row + r);
  } else {
    columns[r] = problem.two_sided ? load_anchor(column_results, problem.b.n, column + r) : no_anchor<A>();
  }
  const SimilarityTile<T> tile = load_tile(problem, row, column, a, b);
  const auto weight_of = [&](int i, int j) { return tile.takes_part(i, j) ? tile.weight(i, j) : A(0); };
  TileSums<A> c;
  bool positive = false;
  for_pairs(c, [&](A&, int i, int j) { positive = positive || weight_of(i, j) != A(0); });
  const bool any = __syncthreads_or(positive);  // most tiles of labelled rows have none
  if (any) {
    find_similarities_again(tile, c);
    const A scale = problem.temperature.template scale<A>();
    reduce_tile(tile, c, row_sums, column_sums, [&](auto lanes, const auto& similarity, const auto& pair_of) {
      constexpr int kCount = std::extent_v<std::remove_reference_t<decltype(similarity)>>;
      A weighted[kCount], loss[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const Pair pair = pair_of(k);
        const AnchorGradient<A>& anchor = lanes.kFirst == 1 ? rows[pair.i] : columns[pair.j];
        const A weight = anchor.attract * weight_of(pair.i, pair.j);
        const A exponent = weight != A(0) ? anchor.exponent(similarity[k], scale) : A(0);
        weighted[k] = weight * rest_of(exponent);
        loss[k] = weight * loss_against_rest(exponent);
      }
      Positives<A> sums{0, 0};
#pragma unroll
      for (int k = 0; k < kCount; ++k) merge(sums, Positives<A>{weighted[k], loss[k]});
      return Positives<A>{lanes_reduce<lanes.kFirst, lanes.kLast>(sums.total, Sum{}),
                          lanes_reduce<lanes.kFirst, lanes.kLast>(sums.similarity, Sum{})};
    });
    __syncthreads();
  }
  const Positives<A> none{0, 0};
  if (thread_in_block() < kTile) {
    const int64_t at = ((int64_t{blockIdx.z} * gridDim.x + blockIdx.x) * gridDim.y + blockIdx.y) * kTile + r;
    of_rows.positives[at] = any ? merged(row_sums, r) : none;
  } else if (problem.two_sided) {
    const int64_t at = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * problem.b.rows + column + r;
    of_columns.positives[at] = any ? merged(column_sums, r) : none;
  }
}

// Grid as for merge_kernel: losses, and the last two statistics of each anchor.
template <typename T, int Most>
__global__ void __launch_bounds__(kRowThreads, 3)
    merge_against_kernel(const __grid_constant__ Terms<T, Most> terms, const __grid_constant__ Merge<acc_t<T>> rows,
                         const __grid_constant__ Merge<acc_t<T>> columns) {
  using A = acc_t<T>;
  const int64_t term = blockIdx.z, n = blockIdx.y == 1 ? terms.at[term].b.n : terms.at[term].a.n;
  const Merge<A>& m = blockIdx.y == 1 ? columns : rows;
  const AnchorResults<A> results = m.results.of_term(term, n);
  for (int64_t r = grid_thread(); r < m.n; r += grid_threads()) {
    const int64_t i = m.first + r;
    const Positives<double> sum = m.merge_positives(term, n, r);
    if (!m.end) continue;
    const double total = results.stats[kTotal * n + i], loss = total != 0 ? sum.similarity / total : 0;
    results.losses[i] = loss;
    results.stats[kPositive * n + i] = static_cast<A>(loss);
    results.stats[kRest * n + i] = static_cast<A>(total != 0 ? sum.total / total : 0);
  }
}

}  // namespace msacore::contrastive::cuda
