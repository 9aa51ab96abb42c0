// Contrastive losses on CUDA: terms between sides, as on the CPU (contrastive_sweep.h), of which a launch takes several
// at once. Rows are scaled once, then the similarities are computed in tiles, forward and again backward. Forward, a
// tile leaves partial statistics of its rows and of its columns, which are merged in order. Backward, the gradients of
// a strip of similarities are kept, for the products with the rows. Positives that are the diagonal concern the tiles
// on it alone; those of equal label are sums over classes (contrastive_classes_kernels.cuh) and concern none. Exponents
// are to base 2 here too.
#pragma once
#include "common/tile_product.cuh"
#include "contrastive_anchor.cuh"

namespace msacore::contrastive {

constexpr int kRowThreads = 256;  // one warp per row

// One role of a term, anchors or candidates; of an embedding that plays several, only the last four fields differ.
template <typename T>
struct Side {
  using A = acc_t<T>;
  const T* x;  // [n, d]
  int64_t n, d;
  int64_t rows, width;  // n and d padded with zeros to whole tiles
  // Set by prepare_row: `unit` · `factor` are the unit rows. 16-bit rows are scaled by a power of two only, so that
  // they stay exact. A negative factor marks a row that takes no part, 0 one of zeros.
  T* unit;                // [rows, width]
  A* factor;              // [rows]
  A* inverse_norm;        // [n], 0 where there is no gradient
  A* gradient;            // [rows, width], backward: of the rows of `unit`
  const int64_t* labels;  // [n] or null; negative: takes no part
  const A* partner;       // [rows] or null: factors of another side, whose missing rows take no part here either
  int64_t* counts;        // rows that take part, anchors that count
  const A* stats;         // [3, n], backward; null for a role whose rows are no anchors

  // The factor of a row in its term.
  __device__ A factor_of(int64_t i) const {
    const bool closed = (partner && partner[i] < 0) || (labels && i < n && labels[i] < 0);
    return closed ? A(-1) : factor[i];
  }
};

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
    kept += stats && stats[2 * n + i] != A(0);
  }
  part = block_sum(part);
  kept = block_sum(kept);
  if (threadIdx.x == 0) {
    counts[0] = part;
    counts[1] = kept;
  }
}

// A term as both passes see it.
template <typename T>
struct Problem {
  using A = acc_t<T>;
  Side<T> a, b;
  Temperature temperature;
  const T* weights;  // [a.n, b.n] or null
  bool both, exclude_self;
  bool pairwise;  // tiles weigh every pair: `weights`, or labels of few rows
  LossGradient<A> gradient;

  __device__ bool diagonal() const { return !pairwise && !a.labels; }
  bool by_classes() const { return !pairwise && a.labels; }
  __device__ bool choice(const Side<T>& other, int64_t i) const {
    return is_choice(other.counts[0], exclude_self && i < other.n && used(other.factor_of(i)));
  }
};

// The terms of a launch, in its parameters; blockIdx.z is the term.
template <typename T, int Most>
struct Terms {
  Problem<T> at[Most];
};

// Where statistics [3, n] and losses [n] of a direction go, `step` numbers per row and term apart. Positives come
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
    stats[2 * n + i] = static_cast<A>(total);
    losses[i] = mean;
  }
};

// What a tile needs of its 64 rows and of its 64 columns, in shared memory.
template <typename A>
struct TileSide {
  A factor[kTile];
  int64_t label[kTile];
};

// Row first + r of a side; returns whether it takes part.
template <typename T>
__device__ __forceinline__ bool load_tile_side(TileSide<acc_t<T>>& tile, const Side<T>& side, int64_t first, int r) {
  const int64_t i = first + r;
  tile.factor[r] = side.factor_of(i);
  tile.label[r] = side.labels && i < side.n ? side.labels[i] : -1;
  return used(tile.factor[r]);
}

// Tile (row, column) of the similarities, and what its threads ask of a pair; i, j: within the tile.
template <typename T>
struct SimilarityTile {
  using A = acc_t<T>;
  const Problem<T>& problem;
  const TileSide<A>&a, &b;
  int64_t row, column;  // of the first pair
  bool whole;           // every pair takes part

  __device__ bool takes_part(int i, int j) const {
    return used(a.factor[i]) && used(b.factor[j]) && !(problem.exclude_self && row + i == column + j);
  }
  __device__ A weight(int i, int j) const {
    if (problem.weights) return static_cast<A>(problem.weights[(row + i) * problem.b.n + column + j]);
    return A(problem.a.labels ? a.label[i] == b.label[j] : row + i == column + j);
  }
  __device__ bool on_diagonal() const { return row == column; }
};

// Calls body(similarity, i, j) for the pairs of this thread.
template <typename C, typename Body>
__device__ __forceinline__ void for_pairs(TileSums<C>& c, const Body& body) {
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int k = 0; k < 4; ++k) body(c[down][across][k], tile_row(down, k), tile_column(across, k));
}

template <typename T>
constexpr int kSimilarityBytes = kTileBytes<T, T, acc_t<T>, true, true>;

// c ← similarities of rows `row` … and columns `column` …; fills the two sides. Called by all threads.
template <typename T>
__device__ __forceinline__ SimilarityTile<T> similarity_tile(const Problem<T>& problem, int64_t row, int64_t column,
                                                             TileSide<acc_t<T>>& a, TileSide<acc_t<T>>& b,
                                                             TileSums<acc_t<T>>& c) {
  const int r = thread_in_block() % kTile;
  const bool part =
      thread_in_block() < kTile ? load_tile_side(a, problem.a, row, r) : load_tile_side(b, problem.b, column, r);
  const bool whole = __syncthreads_and(part) && !(problem.exclude_self && row == column);
  const int64_t width = problem.a.width;
  clear(c);
  add_tile_product<true, true>(c, Matrix<T>{problem.a.unit + row * width, width, kTile, width},
                               Matrix<T>{problem.b.unit + column * width, width, kTile, width}, width);
  for_pairs(c, [&](acc_t<T>& similarity, int i, int j) { similarity *= a.factor[i] * b.factor[j]; });
  return {problem, a, b, row, column, whole};
}

// Partial statistics of anchors; those of positives are used where terms are pairwise, else null.
template <typename A>
struct Parts {
  Softmax<A>* softmax;
  Positives<A>* positives;
};

// In shared memory: what the warps of a tile find of its rows, or of its columns.
template <typename Found>
using TileStats = Found[2][kTile];

template <typename Found>
__device__ __forceinline__ Found merged(const TileStats<Found>& found, int r) {
  Found both = found[0][r];
  merge(both, found[1][r]);
  return both;
}

// Positives of the tile's rows and, with `both`, of its columns.
template <typename T>
__device__ __forceinline__ void weigh_pairs(const SimilarityTile<T>& tile, const TileSums<acc_t<T>>& c,
                                            TileStats<Positives<acc_t<T>>>& of_rows,
                                            TileStats<Positives<acc_t<T>>>& of_columns) {
  using A = acc_t<T>;
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = tile_row(down, 2 * half);
      A weight[8], similarity[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int j = tile_column(k / 2, k % 2);
        const bool part = tile.takes_part(i, j);
        similarity[k] = part ? c[down][k / 2][2 * half + k % 2] : A(0);
        weight[k] = part ? tile.weight(i, j) : A(0);
      }
      const Positives<A> positives = positives_of<1, 2>(weight, similarity);
      if (lane_id() % 4 == 0) of_rows[warp_id() % 2][i] = positives;
    }
  if (!tile.problem.both) return;
#pragma unroll
  for (int across = 0; across < 4; ++across)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int j = tile_column(across, side);
      A weight[4], similarity[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = tile_row(k / 2, k % 2 * 2);
        const bool part = tile.takes_part(i, j);
        similarity[k] = part ? c[k / 2][across][k % 2 * 2 + side] : A(0);
        weight[k] = part ? tile.weight(i, j) : A(0);
      }
      const Positives<A> positives = positives_of<4, 16>(weight, similarity);
      if (lane_id() < 4) of_columns[warp_id() / 2][j] = positives;
    }
}

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
  for_pairs(c, [&](A& value, int, int) { value *= scale; });
  if (!tile.whole) for_pairs(c, [&](A& value, int i, int j) { value = tile.takes_part(i, j) ? value : kNothing<A>; });
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      A exponent[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) exponent[k] = c[down][k / 2][2 * half + k % 2];
      const Softmax<A> softmax = softmax_of<1, 2>(exponent);
      if (lane_id() % 4 == 0) row_softmax[warp_id() % 2][tile_row(down, 2 * half)] = softmax;
    }
  if (problem.both) {
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        A exponent[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) exponent[k] = c[k / 2][across][k % 2 * 2 + side];
        const Softmax<A> softmax = softmax_of<4, 16>(exponent);
        if (lane_id() < 4) column_softmax[warp_id() / 2][tile_column(across, side)] = softmax;
      }
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
      results.losses[i] = finish_anchor(all, results.stats[2 * own.n + i], results.losses[i], problem.choice(other, i),
                                        problem.temperature.template scale<A>(), results.stats, own.n, i);
  }
}

}  // namespace msacore::contrastive
