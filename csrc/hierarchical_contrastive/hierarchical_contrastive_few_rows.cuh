// Few samples of the hierarchical contrastive loss on CUDA, as blocks see them: 16 rows of an embedding meet the rows
// of the other side of a term in tiles of 128. Embeddings are read as they are and their rows scaled by powers of two,
// which is exact, so that a similarity is a product of staged rows times their two factors.
#pragma once
#include "contrastive/cuda/anchor.cuh"
#include "core/round.h"
#include "hierarchical_contrastive/hierarchical_contrastive_kernels.cuh"

namespace msacore::hierarchical_contrastive::cuda {
using namespace contrastive::cuda;

constexpr int kFewTerms = 126, kFewSides = 22;      // those of six modalities
constexpr int kFewRows = 16, kFewCandidates = 128;  // per block; per tile, 16 for each warp
constexpr int kFewColumns = 64;                     // of the rows, staged at once: 8 for each warp
// Staged rows are so far apart that the lanes of a fragment hit different banks.
constexpr int kFewStride = kFewColumns + 4, kFewGradientStride = kFewCandidates + 4;

static_assert(kRowThreads / kWarp * 16 == kFewCandidates && kRowThreads / kWarp * 8 == kFewColumns);

// A term between two sides, which may be the same.
struct FewTerm {
  uint8_t tier, side[2];

  __host__ __device__ bool self() const { return side[0] == side[1]; }
};

template <typename T>
struct FewInputs {
  const T* x[kFewSides];  // [n, width_of(side)]
  Need needs[kFewSides];
  Availability available;
  const int64_t* labels;            // [n], for terms of a side with itself; else null
  int n, width, pair_width, pairs;  // `pairs`: the first side that is a pair
  int side_count, term_count;
  bool by_four;  // rows begin where four numbers can be read at once
  bool normalize;
  FewTerm terms[kFewTerms];
  Temperature temperature[Tiers::kCount];

  __host__ __device__ int width_of(int side) const { return side < pairs ? width : pair_width; }
  __device__ bool takes_part(const FewTerm& term, int i) const {
    const Need need{needs[term.side[0]].modalities | needs[term.side[1]].modalities, 0};
    return (!term.self() || labels[i] >= 0) && available.meets(need, i);
  }
  // Columns k … k + 3 of a row, zeros from `row_width` on; k < row_width.
  __device__ Vector<T, 4> four(const T* row, int k, int row_width) const {
    if (by_four) return load<4>(row + k);
    Vector<T, 4> values;
#pragma unroll
    for (int e = 0; e < 4; ++e) values.at[e] = k + e < row_width ? row[k + e] : T(0.0f);
    return values;
  }
};

// Rows of a side: 1 / |x|, or 1 where rows are not normalised, is factor · scale[0] · scale[1]. The scales are two
// powers of two that share the exponent, because a single one may be out of range. A negative factor marks a row that
// takes no part, 0 one of zeros.
template <typename A, int Rows>
struct FewRows {
  A factor[Rows], scale[2][Rows];
  int64_t label[Rows];
};

// Fills `rows` with those from `first` on of a side; also(r, i, part) is called once for each. Called by a block,
// between barriers.
template <typename T, int Rows, typename TakesPart, typename Also>
__device__ __forceinline__ void load_rows(FewRows<acc_t<T>, Rows>& rows, const FewInputs<T>& in, int side, int first,
                                          TakesPart takes_part, Also also) {
  using A = acc_t<T>;
  constexpr int kLanes = 8, kGroups = kRowThreads / kLanes;  // lanes of a row, rows at once
  constexpr int kTurns = ceil_div(Rows, kGroups);            // rows of a group
  const int d = in.width_of(side), lane = thread_in_block() % kLanes, group = thread_in_block() / kLanes;
  __syncthreads();
  if (group < Rows) {
    bool part[kTurns];
    double largest[kTurns], square[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = first + group + turn * kGroups;
      part[turn] = i < in.n && takes_part(i);
      largest[turn] = square[turn] = 0;
    }
    // Calls body(turn, value) with what this lane reads of its rows.
    const auto for_values = [&](const auto& body) {
      for (int k = 4 * lane; k < d; k += 4 * kLanes)
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
          if (!part[turn]) continue;
          const Vector<T, 4> values = in.four(in.x[side] + int64_t{first + group + turn * kGroups} * d, k, d);
#pragma unroll
          for (int e = 0; e < 4; ++e) body(turn, static_cast<double>(static_cast<A>(values.at[e])));
        }
    };
    if constexpr (std::is_same_v<T, double>) {  // squares of the narrower types are in the range of double
      for_values([&](int turn, double value) { largest[turn] = Max{}(largest[turn], fabs(value)); });
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) largest[turn] = warp_reduce<kLanes>(largest[turn], Max{});
    }
    for_values([&](int turn, double value) {
      if constexpr (std::is_same_v<T, double>) value = inverse_power(largest[turn]).times(value);
      square[turn] += value * value;
    });
    double own_square = 0;  // of the row that this lane completes
    int own_shrunk = 0;
    bool own_part = false;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      square[turn] = warp_sum<kLanes>(square[turn]);
      if (lane != turn) continue;
      own_square = square[turn];
      own_shrunk = std::is_same_v<T, double> ? inverse_power(largest[turn]).exponent : 0;
      own_part = part[turn];
    }
    if (lane < kTurns) {
      const int r = group + lane * kGroups, i = first + r;
      InverseNorm<double> inverse{1, 0};
      if (in.normalize) inverse = inverse_root(own_square, own_shrunk);
      const TwoPowers<A> scale = two_powers<A>(inverse.exponent);
      rows.factor[r] = own_part ? static_cast<A>(inverse.mantissa) : A(-1);
      rows.scale[0][r] = scale.low;
      rows.scale[1][r] = scale.high;
      rows.label[r] = own_part && in.labels ? in.labels[i] : -1;
      also(r, i, own_part);
    }
  }
  __syncthreads();
}

// staged [Rows, kFewStride] ← columns `column` … of the scaled rows, zeros where there are none. Called by a block.
template <typename T, int Rows>
__device__ __forceinline__ void stage_rows(acc_t<T>* staged, const FewRows<acc_t<T>, Rows>& rows,
                                           const FewInputs<T>& in, int side, int first, int column) {
  using A = acc_t<T>;
  constexpr int kFours = kFewColumns / 4;
  const int d = in.width_of(side);
#pragma unroll 4
  for (int q = thread_in_block(); q < Rows * kFours; q += kRowThreads) {
    const int r = q / kFours, k = column + q % kFours * 4;
    Vector<A, 4> scaled{};
    if (k < d && used(rows.factor[r])) {
      const Vector<T, 4> x = in.four(in.x[side] + int64_t{first + r} * d, k, d);
#pragma unroll
      for (int e = 0; e < 4; ++e) scaled.at[e] = static_cast<A>(x.at[e]) * rows.scale[0][r] * rows.scale[1][r];
    }
    store(staged + r * kFewStride + k - column, scaled);
  }
}

// One warp's C [16, 8] += A [16, 8] · B [8, 8], given by a(row, k) and b(k, column). The product is added to C by
// ordinary additions, because tensor cores would cut the sum off instead of rounding it (tile_product.cuh).
template <bool ExactA, bool ExactB, typename C, typename A, typename B>
__device__ __forceinline__ void add_product(C (&c)[4], A a, B b) {
  if constexpr (std::is_same_v<C, double>) {
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] += a(mma_row(i), k) * b(k, mma_column(i));
  } else {
    const int g = lane_id() / 4, t = lane_id() % 4;
    const float left[4] = {a(g, t), a(g + 8, t), a(g, t + 4), a(g + 8, t + 4)}, right[2] = {b(t, g), b(t + 4, g)};
    float product[4] = {};
    mma_float<ExactA, ExactB>(product, left, right);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += product[i];
  }
}

// The block's own rows and a tile of those they meet, staged in dynamic shared memory, kFewColumns columns of each at a
// time.
template <typename T>
struct FewStages {
  using A = acc_t<T>;
  static constexpr int kBytes = (kFewRows + kFewCandidates) * kFewStride * sizeof(A);
  A* const own = dynamic_shared<A>();
  A* const other = own + kFewRows * kFewStride;
  A* const rest = other + kFewCandidates * kFewStride;
};

// A warp's similarities: of rows mma_row(i) with candidates few_candidate(tile, i) of the tile.
__device__ __forceinline__ int few_candidate(int tile, int i) { return warp_id() * 16 + tile * 8 + mma_column(i); }

template <typename A>
__device__ __forceinline__ void clear_few(A (&c)[2][4]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[tile][i] = 0;
}

// Calls body(place, similarity) for a warp's similarities that are kept; `transposed`: the block's rows are of the
// term's second side.
template <typename A, typename Body>
__device__ __forceinline__ void for_few_kept(A (&c)[2][4], const KeptSimilarities<A>& kept, int term, int own_first,
                                             int other_first, bool transposed, const Body& body) {
  A* const of_term = kept.of_term(term);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int own = own_first + mma_row(i), other = other_first + few_candidate(tile, i);
      const int row = transposed ? other : own, column = transposed ? own : other;
      if (other < kept.rows) body(of_term[int64_t{row} * kept.rows + column], c[tile][i]);
    }
}

// c ← similarities; leaves the last columns staged. Called by a block once the rows are loaded.
template <typename T>
__device__ __forceinline__ void few_similarities(acc_t<T> (&c)[2][4], const FewStages<T>& stages,
                                                 const FewInputs<T>& in, const FewRows<acc_t<T>, kFewRows>& own,
                                                 int own_side, int own_first,
                                                 const FewRows<acc_t<T>, kFewCandidates>& other, int other_side,
                                                 int other_first) {
  using A = acc_t<T>;
  const int d = in.width_of(own_side);
  const bool any = other_first + warp_id() * 16 < in.n;
  clear_few(c);
  for (int column = 0; column < d; column += kFewColumns) {
    if (column > 0) __syncthreads();
    stage_rows(stages.own, own, in, own_side, own_first, column);
    stage_rows(stages.other, other, in, other_side, other_first, column);
    __syncthreads();
    for (int k = 0; any && k < min(kFewColumns, d - column); k += 8)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const A* const a = stages.own + k;
        const A* const b = stages.other + (warp_id() * 16 + tile * 8) * kFewStride + k;
        add_product<is_16_bit<T>, is_16_bit<T>>(
            c[tile], [&](int row, int step) { return a[row * kFewStride + step]; },
            [&](int step, int candidate) { return b[candidate * kFewStride + step]; });
      }
  }
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[tile][i] *= own.factor[mma_row(i)] * other.factor[few_candidate(tile, i)];
}

// What a block needs to know of a pair; r and j count within the block's rows and the tile.
template <typename A>
struct FewPairs {
  const FewTerm& term;
  const FewRows<A, kFewRows>& own;
  const FewRows<A, kFewCandidates>& other;
  int own_first, other_first;

  __device__ bool same(int r, int j) const { return own_first + r == other_first + j; }
  __device__ bool take_part(int r, int j) const {
    return used(own.factor[r]) && used(other.factor[j]) && !(term.self() && same(r, j));
  }
  __device__ A weight(int r, int j) const { return A(term.self() ? own.label[r] == other.label[j] : same(r, j)); }
};

}  // namespace msacore::hierarchical_contrastive::cuda
