// Contrastive losses on CUDA: terms between sides, as on the CPU (contrastive_sweep.h), of which a launch takes several
// at once. Rows are scaled once, then the similarities are computed in tiles, forward and again backward. Forward, a
// tile leaves partial statistics of its rows and of its columns, which are merged in order. Backward, the gradients of
// a strip of similarities are kept, for the products with the rows. Positives that are the diagonal concern the tiles
// on it alone; those of equal label are sums over classes (contrastive_classes_kernels.cuh) and concern none. Exponents
// are to base 2 here too.
#pragma once
#include "contrastive/cuda/tile.cuh"

namespace msacore::contrastive::cuda {

// Prepares row i of a side; called by a warp.
template <typename T>
__device__ __forceinline__ void prepare_row(const Side<T>& side, bool takes_part, int64_t i) {
  using A = acc_t<T>;
  const T* x = side.x + i * side.d;
  double square = 0;
  for (int64_t k = lane_id(); takes_part && k < side.d; k += kWarp) {
    const double value = static_cast<double>(static_cast<A>(x[k]));
    square += value * value;
  }
  square = warp_sum(square);
  const double inverse = square == 0 ? 0 : 1 / sqrt(square);
  double scale = inverse;
  if constexpr (is_16_bit<T>) {
    int exponent = 0;
    if (inverse > 0) frexp(inverse, &exponent);
    scale = ldexp(1.0, exponent);
  }
  for (int64_t k = lane_id(); k < side.width; k += kWarp) {
    const bool inside = takes_part && k < side.d;
    side.unit[i * side.width + k] =
        inside ? static_cast<T>(static_cast<A>(static_cast<double>(static_cast<A>(x[k])) * scale)) : T(0.0f);
  }
  if (lane_id() == 0) {
    const double factor = inverse == 0 ? 0 : inverse / scale;
    side.factor[i] = takes_part ? static_cast<A>(factor) : A(-1);
    if (i < side.n) side.inverse_norm[i] = takes_part ? static_cast<A>(inverse) : A(0);
  }
}

// The rows of a side, a warp each, shared out to all blocks of grid.x but `others`; takes_part(i) is asked of i < n.
template <typename T, typename TakesPart>
__device__ __forceinline__ void prepare_rows(const Side<T>& side, int others, TakesPart takes_part) {
  const int64_t warps = (int64_t{gridDim.x} - others) * (kRowThreads / kWarp);
  for (int64_t i = int64_t{blockIdx.x} * (kRowThreads / kWarp) + warp_id(); i < side.rows; i += warps)
    prepare_row(side, i < side.n && takes_part(i), i);
}

// counts[0] ← rows for which takes_part(i), counts[1] ← anchors that count; called by a block.
template <typename A, typename TakesPart>
__device__ __forceinline__ void count_rows(int64_t n, const A* stats, int64_t* counts, TakesPart takes_part) {
  int part = 0, kept = 0;
  for (int64_t i = threadIdx.x; i < n; i += kRowThreads) {
    part += takes_part(i);
    kept += stats && stats[3 * n + i] != A(0);
  }
  part = block_sum(part);
  kept = block_sum(kept);
  if (threadIdx.x == 0) {
    counts[0] = part;
    counts[1] = kept;
  }
}

// The terms of a launch, in its parameters; blockIdx.z is the term.
template <typename T, int Most>
struct Terms {
  Problem<T> at[Most];
};

// Where statistics [4, n] and losses [n] of a direction go, `step` numbers per row and term apart. Positives come
// first: until the loss is known, their mean similarity is in its place.
template <typename A>
struct AnchorResults {
  A* stats;
  int64_t stats_step;
  double* losses;
  int64_t losses_step;

  __host__ __device__ AnchorResults of_term(int64_t term, int64_t n) const {
    return {stats + term * stats_step * n, stats_step, losses + term * losses_step * n, losses_step};
  }
  __device__ void set_positives(int64_t n, int64_t i, double total, double mean) const {
    stats[3 * n + i] = static_cast<A>(total);
    losses[i] = mean;
  }
};

// Partial statistics of anchors; those of positives are used where terms are pairwise, else null.
template <typename A>
struct Parts {
  Softmax<A>* softmax;
  Positives<A>* positives;
};

// Grid [column tiles, row tiles of the strip that begins at `first`, terms]: partial statistics of the strip's rows
// [terms, column tiles, strip] and, with `both`, of all columns [terms, row tiles, b.rows]; diagonal positives go
// straight to the results.
template <typename T, int Most>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 8 ? 2 : 3)
    statistics_kernel(const __grid_constant__ Terms<T, Most> terms, int64_t first,
                      const __grid_constant__ Parts<acc_t<T>> of_rows,
                      const __grid_constant__ Parts<acc_t<T>> of_columns,
                      const __grid_constant__ AnchorResults<acc_t<T>> rows,
                      const __grid_constant__ AnchorResults<acc_t<T>> columns) {
  using A = acc_t<T>;
  const Problem<T>& problem = terms.at[blockIdx.z];
  MSACORE_SHARED(a, TileSide<A>);
  MSACORE_SHARED(b, TileSide<A>);
  MSACORE_SHARED(row_softmax, TileStats<Softmax<A>>);
  MSACORE_SHARED(column_softmax, TileStats<Softmax<A>>);
  MSACORE_SHARED(row_positives, TileStats<Positives<A>>);
  MSACORE_SHARED(column_positives, TileStats<Positives<A>>);
  const int64_t row = first + int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  TileSums<A> c;
  const SimilarityTile<T> tile = similarity_tile(problem, row, column, a, b, c);
  if (problem.pairwise) {
    weigh_pairs(tile, c, row_positives, column_positives);
  } else if (problem.diagonal() && tile.on_diagonal()) {
    for_pairs(c, [&](A similarity, int i, int j) {
      if (i != j || row + i >= problem.a.n) return;
      const bool part = tile.takes_part(i, j);
      const auto set = [&](const AnchorResults<A>& results) {
        results.of_term(blockIdx.z, problem.a.n).set_positives(problem.a.n, row + i, part, part ? similarity : A(0));
      };
      set(rows);
      if (problem.both) set(columns);
    });
  }
  const A scale = problem.temperature.template scale<A>();
  if (is_bounded(scale)) {
    for_pairs(c, [&](A& value, int, int) { value = power2(value * scale - scale); });
    leave_out(tile, c, A(0));
    reduce_tile(tile, c, row_softmax, column_softmax, [&](auto lanes, const auto& power, const auto&) {
      return sum_of_powers<lanes.kFirst, lanes.kLast>(power, scale);
    });
  } else {
    for_pairs(c, [&](A& value, int, int) { value *= scale; });
    leave_out(tile, c, kNothing<A>);
    reduce_tile(tile, c, row_softmax, column_softmax, [&](auto lanes, const auto& exponent, const auto&) {
      return softmax_of<lanes.kFirst, lanes.kLast>(exponent);
    });
  }
  __syncthreads();
  const int r = thread_in_block() % kTile;
  if (thread_in_block() < kTile) {
    const int64_t at = ((int64_t{blockIdx.z} * gridDim.x + blockIdx.x) * gridDim.y + blockIdx.y) * kTile + r;
    of_rows.softmax[at] = merged(row_softmax, r);
    if (problem.pairwise) of_rows.positives[at] = merged(row_positives, r);
  } else if (problem.both) {
    const int64_t at = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * problem.b.rows + column + r;
    of_columns.softmax[at] = merged(column_softmax, r);
    if (problem.pairwise) of_columns.positives[at] = merged(column_positives, r);
  }
}

// Merges partial statistics [terms, count, stride] in their order, for the rows first … first + n of a role; the last
// merge completes the results.
template <typename A>
struct Merge {
  Parts<A> partial;
  int64_t count, stride, first, n;
  bool begin, end;
  Parts<double> running;  // [terms, own.n]
  AnchorResults<A> results;
};

// Grid [blocks, directions, terms]. Where columns are no anchors their direction repeats that of the rows.
template <typename T, int Most>
__global__ void __launch_bounds__(kRowThreads, 3)
    merge_kernel(const __grid_constant__ Terms<T, Most> terms, const __grid_constant__ Merge<acc_t<T>> rows,
                 const __grid_constant__ Merge<acc_t<T>> columns) {
  using A = acc_t<T>;
  const Problem<T>& problem = terms.at[blockIdx.z];
  const bool of_columns = blockIdx.y == 1 && problem.both;
  const Merge<A>& m = of_columns ? columns : rows;
  const Side<T>&own = of_columns ? problem.b : problem.a, &other = of_columns ? problem.a : problem.b;
  const int64_t term = blockIdx.z;
  const AnchorResults<A> results = (blockIdx.y == 1 ? columns : rows).results.of_term(term, own.n);
  // The sum over all tiles so far; after the last of them, the sum over all.
  const auto merge_parts = [&](auto all, const auto* partial, auto* running, int64_t r) {
    const int64_t at = term * own.n + m.first + r;
    if (!m.begin) all = running[at];
    for (int64_t k = 0; k < m.count; ++k) merge(all, in_double(partial[(term * m.count + k) * m.stride + r]));
    if (!m.end) running[at] = all;
    return all;
  };
  for (int64_t r = grid_thread(); r < m.n; r += grid_threads()) {
    const int64_t i = m.first + r;
    const Softmax<double> all = merge_parts(no_softmax<double>(), m.partial.softmax, m.running.softmax, r);
    if (problem.pairwise) {
      const Positives<double> none{0, 0};
      const Positives<double> sum = merge_parts(none, m.partial.positives, m.running.positives, r);
      results.set_positives(own.n, i, sum.total, sum.mean());
    }
    if (m.end)
      results.losses[i] = finish_anchor(all, results.stats[3 * own.n + i], results.losses[i], problem.choice(other, i),
                                        problem.temperature.template scale<A>(), results.stats, own.n, i);
  }
}

}  // namespace msacore::contrastive::cuda
