// InfoNCE on CUDA. Rows are scaled once, then the similarities are computed in tiles, forward and again backward.
// Forward, a tile leaves partial statistics of its rows and of its columns, which are merged in order. Backward, the
// gradients of a strip of similarities are kept, for two products with the rows. The formulas are those of the CPU
// operator (contrastive.cpp); exponents are to base 2 here too.
#pragma once
#include <limits>

#include "common/tile_product.cuh"

namespace msacore::contrastive {

constexpr int kRowThreads = 256;      // one warp per row
constexpr int kFinishThreads = 1024;  // the one block that adds everything up

__device__ __forceinline__ float power2(float x) { return exp2f(x); }
__device__ __forceinline__ double power2(double x) { return exp2(x); }

// A scalar of any floating dtype on the device, or a number.
struct Temperature {
  enum Kind : int { kNumber, kFloat, kDouble, kHalf, kBFloat16 };
  const void* at;
  Kind kind;
  double number;

  __device__ double value() const {
    switch (kind) {
      case kFloat:
        return *static_cast<const float*>(at);
      case kDouble:
        return *static_cast<const double*>(at);
      case kHalf:
        return static_cast<float>(*static_cast<const Half*>(at));
      case kBFloat16:
        return static_cast<float>(*static_cast<const BFloat16*>(at));
      default:
        return number;
    }
  }
  template <typename A>
  __device__ A scale() const {
    return static_cast<A>(1.4426950408889634 / value());
  }
};

// One role of the loss, anchors or candidates.
template <typename T>
struct Side {
  using A = acc_t<T>;
  const T* x;             // [n, d]
  const bool* mask;       // [n] or null
  const int64_t* labels;  // [n] or null
  int64_t n, d;
  int64_t rows, width;  // n and d padded with zeros to whole tiles
  // Set by prepare_kernel: `unit` · `factor` are the unit rows. 16-bit rows are scaled by a power of two only, so that
  // they stay exact. A negative factor marks a row that takes no part, 0 one of zeros.
  T* unit;          // [rows, width]
  A* factor;        // [rows]
  A* inverse_norm;  // [n], 0 where there is no gradient
  int64_t* counts;  // rows that take part, anchors that count
  const A* stats;   // [3, n], backward; null for a role whose rows are no anchors

  __device__ bool takes_part(int64_t i) const { return (!mask || mask[i]) && (!labels || labels[i] >= 0); }
};

__device__ __forceinline__ bool used(float factor) { return !(factor < 0); }
__device__ __forceinline__ bool used(double factor) { return !(factor < 0); }

template <typename T>
struct Sides {
  Side<T> anchors, candidates;

  __device__ const Side<T>& at(int i) const { return i == 0 ? anchors : candidates; }
};

// The last block of a role counts; the others prepare a row per warp. Grid [blocks, 2].
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4) prepare_kernel(const __grid_constant__ Sides<T> sides) {
  using A = acc_t<T>;
  const Side<T>& side = sides.at(blockIdx.y);
  if (blockIdx.x == gridDim.x - 1) {
    int part = 0, kept = 0;
    for (int64_t i = threadIdx.x; i < side.n; i += kRowThreads) {
      part += side.takes_part(i);
      kept += side.stats && side.stats[2 * side.n + i] != A(0);
    }
    part = block_sum(part);
    kept = block_sum(kept);
    if (threadIdx.x == 0) {
      side.counts[0] = part;
      side.counts[1] = kept;
    }
  } else {
    const int64_t warps = (int64_t{gridDim.x} - 1) * (kRowThreads / kWarp);
    for (int64_t i = int64_t{blockIdx.x} * (kRowThreads / kWarp) + warp_id(); i < side.rows; i += warps) {
      const bool takes_part = i < side.n && side.takes_part(i);
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
  }
}

// The loss as both passes see it.
template <typename T>
struct Problem {
  Side<T> a, b;
  Temperature temperature;
  const T* weights;  // [a.n, b.n] or null
  bool both, exclude_self;
  bool mean, per_anchor;  // reduction; neither: a sum

  // An only candidate has probability 1: loss and gradient are zero, exactly.
  __device__ bool choice(const Side<T>& other, int64_t i) const {
    const bool without_self = exclude_self && i < other.n && used(other.factor[i]);
    return other.counts[0] - without_self != 1;
  }
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
  tile.factor[r] = side.factor[i];
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
  tile_product<true, true>(c, problem.a.unit + row * width, width, problem.b.unit + column * width, width, width,
                           kTile);
  __syncthreads();
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[down][across][i] *= a.factor[tile_row(down, i)] * b.factor[tile_column(across, i)];
}

template <typename A>
constexpr A kNothing = -std::numeric_limits<A>::infinity();

// What an anchor knows of some of its candidates: largest exponent, Σ 2^(exponent - maximum), Σ weight, Σ weight ·
// similarity.
template <typename A>
struct Stats {
  A maximum, sum, total, positive;
};

template <typename A>
__device__ __forceinline__ void merge(Stats<A>& to, const Stats<A>& from) {
  const A maximum = Max{}(to.maximum, from.maximum), shift = maximum == kNothing<A> ? A(0) : maximum;
  to.sum = to.sum * power2(to.maximum - shift) + from.sum * power2(from.maximum - shift);
  to.maximum = maximum;
  to.total += from.total;
  to.positive += from.positive;
}

// Statistics of `Count` pairs of each of the lanes that differ in the bits First … Last.
template <int First, int Last, int Count, typename A>
__device__ __forceinline__ Stats<A> stats_of(const A (&exponent)[Count], const A (&weight)[Count],
                                             const A (&similarity)[Count]) {
  const auto reduce = [](A value, auto op) {
#pragma unroll
    for (int step = Last; step >= First; step /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, step));
    return value;
  };
  Stats<A> stats{kNothing<A>, 0, 0, 0};
#pragma unroll
  for (int k = 0; k < Count; ++k) stats.maximum = Max{}(stats.maximum, exponent[k]);
  stats.maximum = reduce(stats.maximum, Max{});
  const A shift = stats.maximum == kNothing<A> ? A(0) : stats.maximum;
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    stats.sum += power2(exponent[k] - shift);
    stats.total += weight[k];
    stats.positive += weight[k] * similarity[k];
  }
  stats.sum = reduce(stats.sum, Sum{});
  stats.total = reduce(stats.total, Sum{});
  stats.positive = reduce(stats.positive, Sum{});
  return stats;
}

// Grid [column tiles, row tiles of the strip that begins at `first`]: partial statistics of the strip's rows
// [column tiles, strip] and, with `both`, of all columns [row tiles, b.rows].
template <typename T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 8 ? 2 : 3)
    statistics_kernel(const __grid_constant__ Problem<T> problem, int64_t first, Stats<acc_t<T>>* __restrict__ of_rows,
                      Stats<acc_t<T>>* __restrict__ of_columns) {
  using A = acc_t<T>;
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
    of_rows[int64_t{blockIdx.x} * gridDim.y * kTile + int64_t{blockIdx.y} * kTile + r] = stats;
  } else if (problem.both) {
    Stats<A> stats = column_stats[0][r];
    merge(stats, column_stats[1][r]);
    of_columns[int64_t{blockIdx.y} * problem.b.rows + column + r] = stats;
  }
}

// Merges partial statistics [count, stride] in their order, for the rows first … first + n of a role; the last merge
// writes what the backward pass needs [3, own.n], and the losses.
template <typename A>
struct Merge {
  const Stats<A>* partial;
  int64_t count, stride, first, n;
  bool begin, end;
  Stats<double>* running;  // [own.n]
  A* stats;                // [3, own.n]
  double* losses;          // [own.n]
};

template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4)
    merge_kernel(const __grid_constant__ Problem<T> problem, const __grid_constant__ Merge<acc_t<T>> rows,
                 const __grid_constant__ Merge<acc_t<T>> columns) {
  using A = acc_t<T>;
  const Merge<A>& m = blockIdx.y == 0 ? rows : columns;
  const Side<T>&own = blockIdx.y == 0 ? problem.a : problem.b, &other = blockIdx.y == 0 ? problem.b : problem.a;
  for (int64_t r = grid_thread(); r < m.n; r += grid_threads()) {
    const int64_t i = m.first + r;
    Stats<double> all = m.begin ? Stats<double>{kNothing<double>, 0, 0, 0} : m.running[i];
    for (int64_t k = 0; k < m.count; ++k) {
      const Stats<A> part = m.partial[k * m.stride + r];
      merge(all, {part.maximum, part.sum, part.total, part.positive});
    }
    if (!m.end) {
      m.running[i] = all;
    } else {
      const bool kept = all.total != 0;
      const double positive = kept ? all.positive / all.total : 0;
      double loss = 0, log_sum_exp = 0;
      if (kept && problem.choice(other, i)) {
        const double log = log2(all.sum), scale = problem.temperature.template scale<A>();
        log_sum_exp = (all.maximum + log) * 0.6931471805599453;
        loss = (all.maximum - scale * positive + log) * 0.6931471805599453;
      }
      m.losses[i] = loss;
      m.stats[i] = static_cast<A>(log_sum_exp);
      m.stats[own.n + i] = static_cast<A>(positive);
      m.stats[2 * own.n + i] = static_cast<A>(all.total);
    }
  }
}

// One block: the loss, from the losses of the rows and of the columns (n = 0 where columns are no anchors).
template <typename A>
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish_kernel(const double* __restrict__ row_losses, const A* __restrict__ row_stats, int64_t n,
                  const double* __restrict__ column_losses, const A* __restrict__ column_stats, int64_t m, bool both,
                  bool mean, bool per_anchor, A* __restrict__ out) {
  if (per_anchor) {
    for (int64_t i = threadIdx.x; i < n; i += kFinishThreads)
      out[i] = static_cast<A>(both ? (row_losses[i] + column_losses[i]) / 2 : row_losses[i]);
  } else {
    const auto sum = [&](const double* losses, const A* stats, int64_t count) {
      double total = 0;
      int kept = 0;
      for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) {
        total += losses[i];
        kept += stats[2 * count + i] != A(0);
      }
      total = block_sum(total);
      kept = block_sum(kept);
      return mean && kept > 0 ? total / kept : total;
    };
    const double rows = sum(row_losses, row_stats, n);
    const double columns = sum(column_losses, column_stats, m);
    if (threadIdx.x == 0) *out = static_cast<A>(both ? (rows + columns) / 2 : rows);
  }
}

}  // namespace msacore::contrastive
