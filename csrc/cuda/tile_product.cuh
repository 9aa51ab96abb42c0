// Product of two matrices by one block: C [64, 64] += A · B over stages of the inner dimension that cp.async fills
// ahead. Tensor cores are used where the types allow: one mma for 16-bit types, three tf32 mma for float32; double uses
// FMA.
//
// Tensor cores truncate their sums towards zero instead of rounding them, so a long sum in one accumulator drifts by a
// unit in the last place with almost every step. An accumulator therefore serves a few steps only, and is then added to
// C by ordinary additions.
#pragma once
#include "core/round.h"
#include "cuda/device.cuh"

namespace msacore::cuda {

constexpr int kTile = 64, kTileThreads = 128;  // four warps, 32 x 32 of C each

// Steps of the inner dimension that are staged at once.
template <typename A>
constexpr int kDepth = std::is_same_v<A, double> ? 16 : 32;

// Stages that one accumulator serves: 16-bit types add 16 steps per mma, float32 adds 8 steps in three parts.
template <typename A, typename B>
constexpr int kStagesOfSum = std::is_same_v<A, B> && is_16_bit<A> ? 4 : 1;

// Operands. An operand copies the 16 bytes from (row, column) on to shared memory, with zeros for what lies outside.
// This one is a matrix in global memory; `aligned` says that address, stride and columns are multiples of 16 bytes.
template <typename T>
struct Matrix {
  using Element = T;
  const T* from;
  int64_t stride, rows, columns;
  bool aligned = true;

  __device__ __forceinline__ void copy16(T* to, int64_t row, int64_t column) const {
    const bool inside = row < rows && column < columns;
    const T* const at = from + (inside ? row * stride + column : 0);
    if (aligned) {
      async_copy16(to, at, inside);
      return;
    }
    Vector<T, kPer16<T>> chunk;
#pragma unroll
    for (int e = 0; e < kPer16<T>; ++e) chunk.at[e] = inside && column + e < columns ? at[e] : T(0.0f);
    store(to, chunk);
  }
};

// A staged operand. With `Inner`, neighbours in memory are neighbours along the inner dimension, otherwise along the
// tile's. Rows are padded so that the lanes of a fragment hit different banks.
template <typename T, typename C, bool Inner>
struct Stage {
  static constexpr int kRows = Inner ? kTile : kDepth<C>, kColumns = Inner ? kDepth<C> : kTile;
  static constexpr int kStride = kColumns + (Inner ? kPer16<T> : 8);
  static constexpr int kBytes = kRows * kStride * sizeof(T);

  // Fills the stage with the steps from `k` on.
  template <typename Operand>
  static __device__ __forceinline__ void copy(T* to, const Operand& operand, int64_t k) {
    constexpr int kPerRow = kColumns / kPer16<T>;
    for (int i = thread_in_block(); i < kRows * kPerRow; i += kTileThreads) {
      const int row = i / kPerRow, column = i % kPerRow * kPer16<T>;
      operand.copy16(to + row * kStride + column, Inner ? row : k + row, Inner ? k + column : column);
    }
  }
  static __device__ __forceinline__ T at(const T* stage, int outer, int k) {
    return stage[Inner ? outer * kStride + k : k * kStride + outer];
  }
  // Fragments (mma.cuh) of 16 rows of A, or 16 columns of B, over 16 steps. `TileFirst` says that the halves of the
  // tile change faster within a fragment than the halves of the steps.
  template <bool TileFirst>
  static __device__ __forceinline__ void fragments(uint32_t (&r)[4], const T* stage, int outer, int k) {
    const int matrix = lane_id() / 8, low = matrix % 2 * 8, high = matrix / 2 * 8, i = lane_id() % 8;
    const int outer_half = outer + (TileFirst ? low : high), k_half = k + (TileFirst ? high : low);
    if constexpr (Inner) {
      load_matrices(r, stage + (outer_half + i) * kStride + k_half);
    } else {
      load_matrices<true>(r, stage + (k_half + i) * kStride + outer_half);
    }
  }
};

template <typename C>
using TileSums = C[2][4][4];  // of one warp: tiles down, tiles across, mma accumulators

__device__ __forceinline__ int tile_row(int down, int i) { return warp_id() / 2 * 32 + down * 16 + mma_row(i); }
__device__ __forceinline__ int tile_column(int across, int i) {
  return warp_id() % 2 * 32 + across * 8 + mma_column(i);
}

// Calls body(row, column, first, second) for every two sums of this thread that are neighbours in a row.
template <typename Sums, typename Body>
__device__ __forceinline__ void for_neighbours(Sums& c, const Body& body) {
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        body(tile_row(down, i), tile_column(across, i), c[down][across][i], c[down][across][i + 1]);
}

// Stores two neighbours of a row that has `left` elements left; `paired`: pairs begin at multiples of their size.
template <typename T>
__device__ __forceinline__ void store_neighbours(T* to, T first, T second, int64_t left, bool paired) {
  if (left > 1 && paired) {
    store(to, Vector<T, 2>{first, second});
  } else {
    if (left > 0) to[0] = first;
    if (left > 1) to[1] = second;
  }
}

// Multiplies the first `steps` steps of a stage, rounded up to whole fragments, for the first `Down` of a warp's two
// tiles down.
template <typename A, typename B, typename C, bool AInner, bool BInner, int Down>
__device__ __forceinline__ void multiply_stage(TileSums<C>& c, const A* a, const B* b, int steps) {
  using StageA = Stage<A, C, AInner>;
  using StageB = Stage<B, C, BInner>;
  const int row = warp_id() / 2 * 32, column = warp_id() % 2 * 32;
  const int g = lane_id() / 4, t = lane_id() % 4;
  if constexpr (std::is_same_v<C, double>) {
    for (int k = 0; k < kDepth<C> && k < steps; ++k) {
#pragma unroll
      for (int down = 0; down < Down; ++down)
#pragma unroll
        for (int across = 0; across < 4; ++across)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            c[down][across][i] += StageA::at(a, tile_row(down, i), k) * StageB::at(b, tile_column(across, i), k);
    }
  } else if constexpr (std::is_same_v<A, B> && is_16_bit<A>) {
#pragma unroll
    for (int k = 0; k < kDepth<C>; k += 16) {
      if (k >= steps) break;
      uint32_t rows[Down][4], columns[2][4];
#pragma unroll
      for (int down = 0; down < Down; ++down) StageA::template fragments<true>(rows[down], a, row + 16 * down, k);
#pragma unroll
      for (int half = 0; half < 2; ++half) StageB::template fragments<false>(columns[half], b, column + 16 * half, k);
#pragma unroll
      for (int across = 0; across < 4; ++across) {
        const uint32_t pair[2] = {columns[across / 2][across % 2 * 2], columns[across / 2][across % 2 * 2 + 1]};
#pragma unroll
        for (int down = 0; down < Down; ++down) mma16<A>(c[down][across], rows[down], pair);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kDepth<C>; k += 8) {
      if (k >= steps) break;
      float rows[Down][4];
#pragma unroll
      for (int down = 0; down < Down; ++down)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          rows[down][r] = static_cast<float>(StageA::at(a, row + down * 16 + g + r % 2 * 8, k + t + r / 2 * 4));
#pragma unroll
      for (int across = 0; across < 4; ++across) {
        float pair[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) pair[r] = static_cast<float>(StageB::at(b, column + across * 8 + g, k + t + r * 4));
#pragma unroll
        for (int down = 0; down < Down; ++down) mma_float<false, is_16_bit<B>>(c[down][across], rows[down], pair);
      }
    }
  }
}

template <typename A, typename B, typename C, bool AInner, bool BInner, int Stages = 2>
constexpr int kTileBytes = Stages * (Stage<A, C, AInner>::kBytes + Stage<B, C, BInner>::kBytes);

template <typename C>
__device__ __forceinline__ void clear(TileSums<C>& c) {
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[down][across][i] = 0;
}

// c += part; part ← 0.
template <typename C>
__device__ __forceinline__ void add_part(TileSums<C>& c, TileSums<C>& part) {
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[down][across][i] += part[down][across][i];
  clear(part);
}

// C += A · B over `depth`. A is given as [64, depth] with `AInner` and as [depth, 64] without; likewise B with
// `BInner`. Sums beyond the first `rows` and `columns` of the tile may be left out. Needs kTileBytes of dynamic shared
// memory for `Stages` stages, all but one of them in flight, and all threads of the block.
template <bool AInner, bool BInner, int Stages = 2, typename OperandA, typename OperandB, typename C>
__device__ __forceinline__ void add_tile_product(TileSums<C>& c, const OperandA& operand_a, const OperandB& operand_b,
                                                 int64_t depth, int64_t rows = kTile, int64_t columns = kTile) {
  using A = typename OperandA::Element;
  using B = typename OperandB::Element;
  using StageA = Stage<A, C, AInner>;
  using StageB = Stage<B, C, BInner>;
  unsigned char* const memory = dynamic_shared<unsigned char>();
  const auto stage_a = [&](int s) { return reinterpret_cast<A*>(memory + s * StageA::kBytes); };
  const auto stage_b = [&](int s) {
    return reinterpret_cast<B*>(memory + Stages * StageA::kBytes + s * StageB::kBytes);
  };
  // Stages are counted in 32 bits, and the steps of the last stage are kept apart, so that the loop needs few
  // registers.
  const int stages = static_cast<int>(ceil_div(depth, kDepth<C>));
  const int last_steps = static_cast<int>(depth - int64_t{stages - 1} * kDepth<C>);
  const auto copy = [&](int stage, int s) {
    if (stage < stages) {
      StageA::copy(stage_a(s), operand_a, int64_t{stage} * kDepth<C>);
      StageB::copy(stage_b(s), operand_b, int64_t{stage} * kDepth<C>);
    }
    async_commit();
  };
  const int first_row = warp_id() / 2 * 32;
  const bool any = columns > warp_id() % 2 * 32 && rows > first_row, both = rows > first_row + 16;
#pragma unroll
  for (int stage = 0; stage < Stages - 1; ++stage) copy(stage, stage);
  int s = 0;
  [[maybe_unused]] TileSums<C> part;
  if constexpr (!std::is_same_v<C, double>) clear(part);
  const auto multiply = [&](TileSums<C>& to, int steps) {
    if (any && both) {
      multiply_stage<A, B, C, AInner, BInner, 2>(to, stage_a(s), stage_b(s), steps);
    } else if (any) {
      multiply_stage<A, B, C, AInner, BInner, 1>(to, stage_a(s), stage_b(s), steps);
    }
  };
  for (int stage = 0; stage < stages; ++stage) {
    async_wait<Stages - 2>();
    __syncthreads();  // this stage is complete, and the readers of the one before are done
    copy(stage + Stages - 1, s == 0 ? Stages - 1 : s - 1);
    const bool last = stage + 1 == stages;
    const int steps = last ? last_steps : kDepth<C>;
    if constexpr (std::is_same_v<C, double>) {
      multiply(c, steps);
    } else {
      multiply(part, steps);
      if (last || (stage + 1) % kStagesOfSum<A, B> == 0) add_part(c, part);
    }
    s = s + 1 == Stages ? 0 : s + 1;
  }
  async_wait<0>();
  __syncthreads();
}

}  // namespace msacore::cuda
