// Contrastive losses on CUDA: terms between sides, as on the CPU (contrastive/cpu/sweep.h); a launch takes several
// terms at once. Rows are scaled once, then the similarities are computed in tiles, forward and again backward.
// Forward, a tile leaves partial statistics of its rows and of its columns, which are merged in order. Backward, the
// gradients of a strip of similarities are kept, for the products with the rows. Positives that are the diagonal
// concern the tiles on it alone; those of equal label are sums over classes (contrastive/cuda/classes_kernels.cuh) and
// concern no tile. Exponents are to base 2 here too.
#pragma once
#include "contrastive/cuda/tile.cuh"

namespace msacore::contrastive::cuda {

// 1 / |x| of a row, the mantissa in double; called by a warp. A row of doubles is scaled by a power of two first,
// because its squares could overflow or underflow; those of narrower types cannot. A NaN or an infinity gives NaN.
template <typename T>
__device__ __forceinline__ InverseNorm<double> inverse_norm_of(const T* x, int64_t d) {
  double largest = 0.5;
  if constexpr (std::is_same_v<T, double>) {
    largest = 0;
    for (int64_t k = lane_id(); k < d; k += kWarp) largest = Max{}(largest, fabs(x[k]));
    largest = warp_max(largest);
  }
  const TwoPowers<double> shrink = inverse_power(largest);
  double square = 0;
  for (int64_t k = lane_id(); k < d; k += kWarp) {
    const double value = shrink.times(static_cast<double>(static_cast<acc_t<T>>(x[k])));
    square += value * value;
  }
  return inverse_root(warp_sum(square), shrink.exponent);
}

// Prepares row i of a side from x [side.d]; called by a warp.
template <typename T>
__device__ __forceinline__ void prepare_row(const Side<T>& side, const T* x, bool takes_part, bool normalize,
                                            int64_t i) {
  using A = acc_t<T>;
  InverseNorm<double> inverse{1, 0};
  if (takes_part && normalize) inverse = inverse_norm_of(x, side.d);
  const TwoPowers<double> power = two_powers(inverse.exponent);
  const double in_row = is_16_bit<T> ? 1 : inverse.mantissa;  // the rest of the mantissa is the factor
  for (int64_t k = lane_id(); k < side.width; k += kWarp) {
    const bool inside = takes_part && k < side.d;
    side.unit[i * side.width + k] =
        inside ? static_cast<T>(static_cast<A>(power.times(static_cast<double>(static_cast<A>(x[k]))) * in_row))
               : T(0.0f);
  }
  if (lane_id() == 0) {
    const double factor = inverse.mantissa == 0 ? 0 : inverse.mantissa / in_row;
    side.factor[i] = takes_part ? static_cast<A>(factor) : A(-1);
    side.inverse_norm[i] = {takes_part ? static_cast<A>(inverse.mantissa) : A(0), inverse.exponent};
  }
}

// Prepares the rows of a side, a warp each, in all blocks of grid.x but the last `others`; row_of(i) and takes_part(i)
// are called for i < count, the remaining rows are padding.
template <typename T, typename RowOf, typename TakesPart>
__device__ __forceinline__ void prepare_rows(const Side<T>& side, int64_t count, bool normalize, int others,
                                             RowOf row_of, TakesPart takes_part) {
  const int64_t warps = (int64_t{gridDim.x} - others) * (kRowThreads / kWarp);
  for (int64_t i = int64_t{blockIdx.x} * (kRowThreads / kWarp) + warp_id(); i < side.rows; i += warps) {
    const bool inside = i < count;
    prepare_row(side, inside ? row_of(i) : nullptr, inside && takes_part(i), normalize, i);
  }
}

// counts[0] ← how many rows i < end have takes_part(i), counts[1] ← how many of the n anchors count; called by a block.
template <typename A, typename TakesPart>
__device__ __forceinline__ void count_rows(int64_t n, int64_t end, const A* stats, int64_t* counts,
                                           TakesPart takes_part) {
  int part = 0, kept = 0;
  for (int64_t i = threadIdx.x; i < end; i += kRowThreads) {
    part += takes_part(i);
    kept += stats && i < n && stats[kTotal * n + i] != A(0);
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

// Where statistics [4 or 5, n] and losses [n] of a direction go, `stats_step` and `losses_step` numbers per row and
// term apart. The positives are set first: until the loss is known, their mean similarity is in its place.
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
    stats[kTotal * n + i] = static_cast<A>(total);
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
// [terms, column tiles, strip] and, for a two-sided term, of all columns [terms, row tiles, b.rows]; diagonal positives
// go straight to the results. `Apart`: denominators without positives.
template <typename T, int Most, bool Apart>
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
  const SimilarityTile<T> tile = load_tile(problem, row, column, a, b);
  find_first_similarities(tile, c);
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
      if (problem.two_sided) set(columns);
    });
  }
  const A scale = problem.temperature.template scale<A>();
  if (!Apart && problem.bounded(scale)) {
    for_pairs(c, [&](A& value, int, int) { value = power2(value * scale - scale); });
    leave_out(tile, c, A(0));
    reduce_tile(tile, c, row_softmax, column_softmax, [&](auto lanes, const auto& power, const auto&) {
      return sum_of_powers<lanes.kFirst, lanes.kLast>(power);
    });
  } else {
    leave_out(tile, c, kNothing<A>);
    if constexpr (Apart)
      for_pairs(c, [&](A& value, int i, int j) {
        if (tile.takes_part(i, j) && tile.weight(i, j) != A(0)) value = kNothing<A>;
      });
    reduce_tile(tile, c, row_softmax, column_softmax, [&](auto lanes, const auto& similarity, const auto&) {
      return softmax_of<lanes.kFirst, lanes.kLast>(similarity, scale);
    });
  }
  __syncthreads();
  const int r = thread_in_block() % kTile;
  if (thread_in_block() < kTile) {
    const int64_t at = ((int64_t{blockIdx.z} * gridDim.x + blockIdx.x) * gridDim.y + blockIdx.y) * kTile + r;
    of_rows.softmax[at] = merged(row_softmax, r, scale);
    if (problem.pairwise) of_rows.positives[at] = merged(row_positives, r);
  } else if (problem.two_sided) {
    const int64_t at = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * problem.b.rows + column + r;
    of_columns.softmax[at] = merged(column_softmax, r, scale);
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

  // Row r of a role that has `own` rows: calls add(all, part) for all tiles so far, starting from `all`, and returns
  // the result, which after the last merge covers every tile.
  template <typename All, typename Part, typename Add>
  __device__ All merge_parts(All all, const Part* part, All* sums, int64_t term, int64_t own, int64_t r,
                             Add add) const {
    const int64_t at = term * own + first + r;
    if (!begin) all = sums[at];
    for (int64_t k = 0; k < count; ++k) add(all, in_double(part[(term * count + k) * stride + r]));
    if (!end) sums[at] = all;
    return all;
  }
  __device__ Positives<double> merge_positives(int64_t term, int64_t own, int64_t r) const {
    return merge_parts(Positives<double>{0, 0}, partial.positives, running.positives, term, own, r,
                       [](auto& to, const auto& from) { merge(to, from); });
  }
};

// Grid [blocks, directions, terms]. Where columns are not anchors, their direction repeats that of the rows.
template <typename T, int Most>
__global__ void __launch_bounds__(kRowThreads, 3)
    merge_kernel(const __grid_constant__ Terms<T, Most> terms, const __grid_constant__ Merge<acc_t<T>> rows,
                 const __grid_constant__ Merge<acc_t<T>> columns) {
  using A = acc_t<T>;
  const Problem<T>& problem = terms.at[blockIdx.z];
  const bool of_columns = blockIdx.y == 1 && problem.two_sided;
  const Merge<A>& m = of_columns ? columns : rows;
  const Side<T>&own = of_columns ? problem.b : problem.a, &other = of_columns ? problem.a : problem.b;
  const int64_t term = blockIdx.z;
  const AnchorResults<A> results = (blockIdx.y == 1 ? columns : rows).results.of_term(term, own.n);
  const double scale = problem.temperature.template scale<A>();
  for (int64_t r = grid_thread(); r < m.n; r += grid_threads()) {
    const int64_t i = m.first + r;
    const Softmax<double> all = m.merge_parts(no_softmax<double>(), m.partial.softmax, m.running.softmax, term, own.n,
                                              r, [&](auto& to, const auto& from) { merge(to, from, scale); });
    if (problem.pairwise) {
      const Positives<double> sum = m.merge_positives(term, own.n, r);
      results.set_positives(own.n, i, sum.total, sum.mean());
    }
    if (!m.end) continue;
    const bool dropped = problem.denominator == Denominator::kDecoupled && all.sum == 0;
    results.losses[i] = finish_anchor(all, dropped ? 0 : static_cast<double>(results.stats[kTotal * own.n + i]),
                                      results.losses[i], problem.choice(other, i), scale, results.stats, own.n, i);
  }
}

}  // namespace msacore::contrastive::cuda
