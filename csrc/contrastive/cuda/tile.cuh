// A tile of similarities on CUDA: its term and the two sides, its pairs, and the sums over them for its rows and
// columns.
#pragma once
#include <type_traits>

#include "cuda/tile_product.cuh"
#include "contrastive/cuda/anchor.cuh"

namespace msacore::contrastive::cuda {
using namespace msacore::cuda;

constexpr int kRowThreads = 256;  // one warp per row

// One role of a term, anchors or candidates. Where an embedding plays several roles, only the last four fields differ.
template <typename T>
struct Side {
  using A = acc_t<T>;
  const T* x;  // [n, d]
  int64_t n, d;
  int64_t rows, width;  // n and further candidates, positive for none, in whole tiles; d padded to 32
  // Set by prepare_row: `unit` · `factor` are the unit rows, or the rows themselves. 16-bit rows are scaled by a power
  // of two only, so that they stay exact. A negative factor marks a row that takes no part, 0 one of zeros.
  T* unit;                       // [rows, width]
  A* factor;                     // [rows]
  InverseNorm<A>* inverse_norm;  // [rows]
  A* gradient;                   // [rows, width], backward: of the rows of `unit`
  const int64_t* labels;         // [n] or null; negative: takes no part
  const A* partner;              // [rows] or null: factors of another side, whose missing rows take no part here either
  int64_t* counts;               // rows that take part, anchors that count
  const A* stats;                // [4 or 5, n], backward; null for a role whose rows are not anchors

  // The factor of a row in its term.
  __device__ A factor_of(int64_t i) const {
    const bool closed = (partner && partner[i] < 0) || (labels && i < n && labels[i] < 0);
    return closed ? A(-1) : factor[i];
  }
};

// A term as both passes see it.
template <typename T>
struct Problem {
  using A = acc_t<T>;
  Side<T> a, b;
  Temperature temperature;
  const T* weights;  // [a.n, b.n] or null
  bool two_sided, exclude_self;
  bool pairwise;  // tiles weigh every pair: `weights`, labels of few rows, denominators without positives
  bool unit_rows;
  Denominator denominator;
  LossGradient<A> gradient;
  // Similarities that the first sweep keeps for the others [kept_rows, kept_columns], whose sizes are even; null: they
  // are computed again.
  A* kept;
  int kept_rows, kept_columns;
  int64_t offset;  // row i of a is row i + offset of b: not 0 where a is a part of a batch, whose terms are pairwise

  // Exponents are those of cosines and stay in range.
  __device__ bool bounded(A scale) const { return unit_rows && is_bounded(scale); }
  __device__ bool diagonal() const { return !pairwise && !a.labels; }
  bool by_classes() const { return !pairwise && a.labels; }
  // `other` is a or b itself.
  __device__ bool choice(const Side<T>& other, int64_t i) const {
    const int64_t same = &other == &b ? i + offset : i - offset;
    return is_choice(other.counts[0], exclude_self && same >= 0 && same < other.n && used(other.factor_of(same)));
  }
};

// What a tile needs to know of its 64 rows or its 64 columns, in shared memory.
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

// The tile of similarities at (row, column), and what its threads need to know of a pair; i and j count within the
// tile.
template <typename T>
struct SimilarityTile {
  using A = acc_t<T>;
  const Problem<T>& problem;
  const TileSide<A>&a, &b;
  int64_t row, column;  // of the first pair
  bool whole;           // every pair takes part

  // Rows of b from b.n on have no counterpart in a.
  __device__ bool same(int i, int j) const {
    return row + i + problem.offset == column + j && column + j < problem.b.n;
  }
  __device__ bool takes_part(int i, int j) const {
    return used(a.factor[i]) && used(b.factor[j]) && !(problem.exclude_self && same(i, j));
  }
  // Weight of a pair that takes part.
  __device__ A weight(int i, int j) const {
    if (problem.weights)
      return column + j < problem.b.n ? static_cast<A>(problem.weights[(row + i) * problem.b.n + column + j]) : A(0);
    return A(problem.a.labels ? a.label[i] == b.label[j] : same(i, j));
  }
  __device__ bool on_diagonal() const { return row == column; }
};

template <typename V>
__device__ __forceinline__ void assign(V& to, const V& from) {
  if constexpr (std::is_array_v<V>) {
#pragma unroll
    for (size_t i = 0; i < std::extent_v<V>; ++i) assign(to[i], from[i]);
  } else {
    to = from;
  }
}

// Every value moves one place down, and the first one to the end.
template <typename V, int Count>
__device__ __forceinline__ void rotate(V (&values)[Count]) {
  V first;
  assign(first, values[0]);
#pragma unroll
  for (int i = 1; i < Count; ++i) assign(values[i - 1], values[i]);
  assign(values[Count - 1], first);
}

// Calls body(i, values[i]…) for i < Count, where the values stay in registers. An exponential in double takes some
// forty instructions, so that the loop over doubles is not unrolled: its body works on the first place, and the values
// rotate through it.
template <typename C, int Count, typename Body, typename... V>
__device__ __forceinline__ void for_each_place(const Body& body, V (&... values)[Count]) {
  if constexpr (std::is_same_v<C, double>) {
#pragma unroll 1
    for (int i = 0; i < Count; ++i) {
      body(i, values[0]...);
      (rotate(values), ...);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Count; ++i) body(i, values[i]...);
  }
}

// Calls body(similarity, i, j) for the pairs of this thread.
template <typename C, typename Body>
__device__ __forceinline__ void for_pairs(TileSums<C>& c, const Body& body) {
  for_each_place<C>(
      [&](int down, C(&tiles)[4][4]) {
        for_each_place<C>(
            [&](int across, C(&sums)[4]) {
#pragma unroll
              for (int k = 0; k < 4; ++k) body(sums[k], tile_row(down, k), tile_column(across, k));
            },
            tiles);
      },
      c);
}

// c ← `nothing` for pairs that take no part.
template <typename T>
__device__ __forceinline__ void leave_out(const SimilarityTile<T>& tile, TileSums<acc_t<T>>& c, acc_t<T> nothing) {
  if (tile.whole) return;
  for_pairs(c, [&](acc_t<T>& value, int i, int j) { value = tile.takes_part(i, j) ? value : nothing; });
}

template <typename T>
constexpr int kSimilarityBytes = kTileBytes<T, T, acc_t<T>, true, true>;

// Fills the two sides of a tile of rows `row` … and columns `column` …. Called by all threads.
template <typename T>
__device__ __forceinline__ SimilarityTile<T> load_tile(const Problem<T>& problem, int64_t row, int64_t column,
                                                       TileSide<acc_t<T>>& a, TileSide<acc_t<T>>& b) {
  const int r = thread_in_block() % kTile;
  const bool part =
      thread_in_block() < kTile ? load_tile_side(a, problem.a, row, r) : load_tile_side(b, problem.b, column, r);
  const int64_t beside = row + problem.offset - column;
  const bool has_same = problem.exclude_self && beside > -kTile && beside < kTile;
  const bool whole = __syncthreads_and(part) && !has_same;
  return {problem, a, b, row, column, whole};
}

// c ← the tile's similarities. Called by all threads.
template <typename T>
__device__ __forceinline__ void find_similarities(const SimilarityTile<T>& tile, TileSums<acc_t<T>>& c) {
  const Problem<T>& problem = tile.problem;
  const int64_t width = problem.a.width;
  clear(c);
  add_tile_product<true, true>(c, Matrix<T>{problem.a.unit + tile.row * width, width, kTile, width},
                               Matrix<T>{problem.b.unit + tile.column * width, width, kTile, width}, width);
  for_pairs(c, [&](acc_t<T>& similarity, int i, int j) { similarity *= tile.a.factor[i] * tile.b.factor[j]; });
}

// Calls body(place, first, second) for neighbours among this thread's pairs whose similarities are kept.
template <typename T, typename Body>
__device__ __forceinline__ void for_kept(const SimilarityTile<T>& tile, TileSums<acc_t<T>>& c, const Body& body) {
  using A = acc_t<T>;
  const Problem<T>& problem = tile.problem;
  for_neighbours(c, [&](int i, int j, A& first, A& second) {
    const int64_t row = tile.row + i, column = tile.column + j;
    if (row < problem.kept_rows && column < problem.kept_columns)
      body(problem.kept + row * problem.kept_columns + column, first, second);
  });
}

// c ← the tile's similarities, of which the first sweep keeps a copy unless `kept` is null. Called by all threads.
template <typename T>
__device__ __forceinline__ void find_first_similarities(const SimilarityTile<T>& tile, TileSums<acc_t<T>>& c) {
  using A = acc_t<T>;
  find_similarities(tile, c);
  if (tile.problem.kept) for_kept(tile, c, [](A* to, A first, A second) { store(to, Vector<A, 2>{first, second}); });
}

// c ← the tile's similarities: those that were kept, or computed again. Called by all threads.
template <typename T>
__device__ __forceinline__ void find_similarities_again(const SimilarityTile<T>& tile, TileSums<acc_t<T>>& c) {
  using A = acc_t<T>;
  if (!tile.problem.kept) return find_similarities(tile, c);
  clear(c);
  for_kept(tile, c, [](const A* from, A& first, A& second) {
    const Vector<A, 2> pair = load<2>(from);
    first = pair.at[0];
    second = pair.at[1];
  });
}

// In shared memory: what the warps of a tile find for its rows, or for its columns.
template <typename Found>
using TileStats = Found[2][kTile];

template <typename Found, typename... Scale>
__device__ __forceinline__ Found merged(const TileStats<Found>& found, int r, Scale... scale) {
  Found both = found[0][r];
  merge(both, found[1][r], scale...);
  return both;
}

// The lanes of a warp that share a row, or a column.
template <int First, int Last>
struct LaneBits {
  static constexpr int kFirst = First, kLast = Last;
};

// A pair's place within the tile.
struct Pair {
  int i, j;
};

// Fills of_rows and, in a two-sided term, of_columns with what find(lanes, values, pair_of) makes of the values of c in
// a row or column; pair_of(k) is the place of values[k].
template <typename T, typename Found, typename Find>
__device__ __forceinline__ void reduce_tile(const SimilarityTile<T>& tile, TileSums<acc_t<T>>& c,
                                            TileStats<Found>& of_rows, TileStats<Found>& of_columns, const Find& find) {
  using A = acc_t<T>;
  for_each_place<A>(
      [&](int down, const A(&tiles)[4][4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = tile_row(down, 2 * half);
          A value[8];
#pragma unroll
          for (int k = 0; k < 8; ++k) value[k] = tiles[k / 2][2 * half + k % 2];
          const Found found = find(LaneBits<1, 2>{}, value, [&](int k) { return Pair{i, tile_column(k / 2, k % 2)}; });
          if (lane_id() % 4 == 0) of_rows[warp_id() % 2][i] = found;
        }
      },
      c);
  if (!tile.problem.two_sided) return;
  for_each_place<A>(
      [&](int across, const A(&upper)[4], const A(&lower)[4]) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int j = tile_column(across, side);
          const A value[4] = {upper[side], upper[2 + side], lower[side], lower[2 + side]};
          const Found found =
              find(LaneBits<4, 16>{}, value, [&](int k) { return Pair{tile_row(k / 2, k % 2 * 2), j}; });
          if (lane_id() < 4) of_columns[warp_id() / 2][j] = found;
        }
      },
      c[0], c[1]);
}

// Positives of the tile's rows and, in a two-sided term, of its columns.
template <typename T>
__device__ __forceinline__ void weigh_pairs(const SimilarityTile<T>& tile, TileSums<acc_t<T>>& c,
                                            TileStats<Positives<acc_t<T>>>& of_rows,
                                            TileStats<Positives<acc_t<T>>>& of_columns) {
  using A = acc_t<T>;
  reduce_tile(tile, c, of_rows, of_columns, [&](auto lanes, const auto& value, const auto& pair_of) {
    constexpr int kCount = std::extent_v<std::remove_reference_t<decltype(value)>>;
    A weight[kCount], similarity[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Pair pair = pair_of(k);
      const bool part = tile.takes_part(pair.i, pair.j);
      similarity[k] = part ? value[k] : A(0);
      weight[k] = part ? tile.weight(pair.i, pair.j) : A(0);
    }
    return positives_of<lanes.kFirst, lanes.kLast>(weight, similarity);
  });
}

}  // namespace msacore::contrastive::cuda
