// Contrastive losses on CUDA: terms between sides, as on the CPU (contrastive_sweep.h), of which a launch takes several
// at once. Rows are scaled once, then the similarities are computed in tiles, forward and again backward. Forward, a
// tile leaves partial statistics of its rows and of its columns, which are merged in order. Backward, the gradients of
// a strip of similarities are kept, for the products with the rows. Exponents are to base 2 here too.
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
  LossGradient<A> gradient;

  __device__ bool choice(const Side<T>& other, int64_t i) const {
    return is_choice(other.counts[0], exclude_self && i < other.n && used(other.factor_of(i)));
  }
};

// The terms of a launch, in its parameters; blockIdx.z is the term.
template <typename T, int Most>
struct Terms {
  Problem<T> at[Most];
};

// What a tile needs of its 64 rows and of its 64 columns, in shared memory.
template <typename A>
struct TileSide {
  A factor[kTile];
  int64_t label[kTile];
};

template <typename T>
__device__ __forceinline__ void load_tile_side(TileSide<acc_t<T>>& tile, const Side<T>& side, int64_t first, int r) {
  const int64_t i = first + r;
  tile.factor[r] = side.factor_of(i);
  tile.label[r] = side.labels && i < side.n ? side.labels[i] : -1;
}

// Tile (row, column) of the similarities: the product, and what its threads ask of a pair.
template <typename T>
struct SimilarityTile {
  using A = acc_t<T>;
  const Problem<T>& problem;
  const TileSide<A>&a, &b;
  int64_t row, column;  // of the first pair
  TileSums<A>& c;

  // i, j: within the tile.
  __device__ bool takes_part(int i, int j) const {
    return used(a.factor[i]) && used(b.factor[j]) && !(problem.exclude_self && row + i == column + j);
  }
  __device__ A weight(int i, int j) const {
    if (problem.weights) return static_cast<A>(problem.weights[(row + i) * problem.b.n + column + j]);
    return A(problem.a.labels ? a.label[i] == b.label[j] : row + i == column + j);
  }
};

template <typename T>
constexpr int kSimilarityBytes = kTileBytes<T, T, acc_t<T>, true, true>;

// c ← similarities of rows `row` … and columns `column` …; fills the two sides. Called by all threads.
template <typename T>
__device__ __forceinline__ void similarity_tile(const Problem<T>& problem, int64_t row, int64_t column,
                                                TileSide<acc_t<T>>& a, TileSide<acc_t<T>>& b, TileSums<acc_t<T>>& c) {
  const int r = thread_in_block() % kTile;
  if (thread_in_block() < kTile) {
    load_tile_side(a, problem.a, row, r);
  } else {
    load_tile_side(b, problem.b, column, r);
  }
  const int64_t width = problem.a.width;
  clear(c);
  add_tile_product<true, true>(c, Matrix<T>{problem.a.unit + row * width, width, kTile, width},
                               Matrix<T>{problem.b.unit + column * width, width, kTile, width}, width);
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[down][across][i] *= a.factor[tile_row(down, i)] * b.factor[tile_column(across, i)];
}

// Grid [column tiles, row tiles of the strip that begins at `first`, terms]: partial statistics of the strip's rows
// [terms, column tiles, strip] and, with `both`, of all columns [terms, row tiles, b.rows].
template <typename T, int Most>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 8 ? 2 : 3)
    statistics_kernel(const __grid_constant__ Terms<T, Most> terms, int64_t first,
                      Stats<acc_t<T>>* __restrict__ of_rows, Stats<acc_t<T>>* __restrict__ of_columns) {
  using A = acc_t<T>;
  const Problem<T>& problem = terms.at[blockIdx.z];
  MSACORE_SHARED(a, TileSide<A>);
  MSACORE_SHARED(b, TileSide<A>);
  MSACORE_SHARED(row_stats, Stats<A>[2][kTile]);
  MSACORE_SHARED(column_stats, Stats<A>[2][kTile]);
  const int64_t row = first + int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  TileSums<A> c;
  similarity_tile(problem, row, column, a, b, c);
  const SimilarityTile<T> tile{problem, a, b, row, column, c};
  const A scale = problem.temperature.template scale<A>();
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = tile_row(down, 2 * half);
      A exponent[8], weight[8], similarity[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int j = tile_column(k / 2, k % 2);
        const bool part = tile.takes_part(i, j);
        similarity[k] = part ? c[down][k / 2][2 * half + k % 2] : A(0);
        exponent[k] = part ? similarity[k] * scale : kNothing<A>;
        weight[k] = part ? tile.weight(i, j) : A(0);
      }
      const Stats<A> stats = stats_of<1, 2>(exponent, weight, similarity);
      if (lane_id() % 4 == 0) row_stats[warp_id() % 2][i] = stats;
    }
  if (problem.both) {
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int j = tile_column(across, side);
        A exponent[4], weight[4], similarity[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int i = tile_row(k / 2, k % 2 * 2);
          const bool part = tile.takes_part(i, j);
          similarity[k] = part ? c[k / 2][across][k % 2 * 2 + side] : A(0);
          exponent[k] = part ? similarity[k] * scale : kNothing<A>;
          weight[k] = part ? tile.weight(i, j) : A(0);
        }
        const Stats<A> stats = stats_of<4, 16>(exponent, weight, similarity);
        if (lane_id() < 4) column_stats[warp_id() / 2][j] = stats;
      }
  }
  __syncthreads();
  const int r = thread_in_block() % kTile;
  if (thread_in_block() < kTile) {
    Stats<A> stats = row_stats[0][r];
    merge(stats, row_stats[1][r]);
    of_rows[((int64_t{blockIdx.z} * gridDim.x + blockIdx.x) * gridDim.y + blockIdx.y) * kTile + r] = stats;
  } else if (problem.both) {
    Stats<A> stats = column_stats[0][r];
    merge(stats, column_stats[1][r]);
    of_columns[(int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * problem.b.rows + column + r] = stats;
  }
}

// Merges partial statistics [terms, count, stride] in their order, for the rows first … first + n of a role; the last
// merge writes what the backward pass needs, and the losses. Both lie `step` · own.n numbers per term apart.
template <typename A>
struct Merge {
  const Stats<A>* partial;
  int64_t count, stride, first, n;
  bool begin, end;
  Stats<double>* running;  // [terms, own.n]
  A* stats;                // [3, own.n] of each term
  int64_t stats_step;
  double* losses;  // [own.n] of each term
  int64_t losses_step;
};

// Grid [blocks, directions, terms]. Where columns are no anchors their direction repeats that of the rows.
template <typename T, int Most>
__global__ void __launch_bounds__(kRowThreads, 4)
    merge_kernel(const __grid_constant__ Terms<T, Most> terms, const __grid_constant__ Merge<acc_t<T>> rows,
                 const __grid_constant__ Merge<acc_t<T>> columns) {
  using A = acc_t<T>;
  const Problem<T>& problem = terms.at[blockIdx.z];
  const bool of_columns = blockIdx.y == 1 && problem.both;
  const Merge<A>&m = of_columns ? columns : rows, &to = blockIdx.y == 1 ? columns : rows;
  const Side<T>&own = of_columns ? problem.b : problem.a, &other = of_columns ? problem.a : problem.b;
  const int64_t term = blockIdx.z;
  const Stats<A>* const partial = m.partial + term * m.count * m.stride;
  A* const stats = to.stats + term * to.stats_step * own.n;
  double* const losses = to.losses + term * to.losses_step * own.n;
  for (int64_t r = grid_thread(); r < m.n; r += grid_threads()) {
    const int64_t i = m.first + r;
    Stats<double> all = m.begin ? Stats<double>{kNothing<double>, 0, 0, 0} : m.running[term * own.n + i];
    for (int64_t k = 0; k < m.count; ++k) merge(all, in_double(partial[k * m.stride + r]));
    if (!m.end) {
      m.running[term * own.n + i] = all;
    } else {
      losses[i] =
          finish_anchor(all, problem.choice(other, i), problem.temperature.template scale<A>(), stats, own.n, i);
    }
  }
}

}  // namespace msacore::contrastive
