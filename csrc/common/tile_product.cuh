// A block's product of two matrices in global memory: C [64, 64] = A · B in tiles that cp.async keeps two deep, on
// tensor cores where the types allow.
#pragma once
#include "common/device.cuh"

namespace msacore {

constexpr int kTile = 64, kTileThreads = 128;  // four warps, 32 x 32 of C each

// Steps of the inner dimension that are staged at once.
template <typename A>
constexpr int kDepth = std::is_same_v<A, double> ? 16 : 32;

// A staged operand: `Inner` says that neighbours in memory are neighbours along the inner dimension, else along the
// tile's. Rows are padded so that the lanes of a fragment hit different banks.
template <typename T, typename C, bool Inner>
struct Stage {
  static constexpr int kRows = Inner ? kTile : kDepth<C>, kColumns = Inner ? kDepth<C> : kTile;
  static constexpr int kStride = kColumns + (Inner ? kPer16<T> : 8);
  static constexpr int kBytes = kRows * kStride * sizeof(T);

  // Rows begin at `from`, `stride` apart; columns from `valid` on are zeros.
  static __device__ __forceinline__ void copy(T* to, const T* from, int64_t stride, int64_t valid) {
    constexpr int kPerRow = kColumns / kPer16<T>;
    for (int i = thread_in_block(); i < kRows * kPerRow; i += kTileThreads) {
      const int row = i / kPerRow, column = i % kPerRow * kPer16<T>;
      const bool inside = column < valid;
      async_copy16(to + row * kStride + column, from + (inside ? row * stride + column : 0), inside);
    }
  }
  static __device__ __forceinline__ T at(const T* stage, int outer, int k) {
    return stage[Inner ? outer * kStride + k : k * kStride + outer];
  }
  // Fragments of two neighbours of 16 steps, along A's rows or B's columns (mma.cuh): `First` says which of the two
  // halves, of the tile or of the steps, changes faster in the fragment.
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

template <typename A, typename B, typename C, bool AInner, bool BInner>
__device__ __forceinline__ void multiply_stage(TileSums<C>& c, const A* a, const B* b) {
  using StageA = Stage<A, C, AInner>;
  using StageB = Stage<B, C, BInner>;
  const int row = warp_id() / 2 * 32, column = warp_id() % 2 * 32;
  const int g = lane_id() / 4, t = lane_id() % 4;
  if constexpr (std::is_same_v<C, double>) {
    for (int k = 0; k < kDepth<C>; ++k) {
#pragma unroll
      for (int down = 0; down < 2; ++down)
#pragma unroll
        for (int across = 0; across < 4; ++across)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            c[down][across][i] += StageA::at(a, tile_row(down, i), k) * StageB::at(b, tile_column(across, i), k);
    }
  } else if constexpr (std::is_same_v<A, B> && is_16_bit<A>) {
#pragma unroll
    for (int k = 0; k < kDepth<C>; k += 16) {
      uint32_t rows[2][4], columns[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        StageA::template fragments<true>(rows[half], a, row + 16 * half, k);
        StageB::template fragments<false>(columns[half], b, column + 16 * half, k);
      }
#pragma unroll
      for (int across = 0; across < 4; ++across) {
        const uint32_t pair[2] = {columns[across / 2][across % 2 * 2], columns[across / 2][across % 2 * 2 + 1]};
#pragma unroll
        for (int down = 0; down < 2; ++down) mma16<A>(c[down][across], rows[down], pair);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kDepth<C>; k += 8) {
      float rows[2][4];
#pragma unroll
      for (int down = 0; down < 2; ++down)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          rows[down][r] = static_cast<float>(StageA::at(a, row + down * 16 + g + r % 2 * 8, k + t + r / 2 * 4));
#pragma unroll
      for (int across = 0; across < 4; ++across) {
        float pair[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) pair[r] = static_cast<float>(StageB::at(b, column + across * 8 + g, k + t + r * 4));
#pragma unroll
        for (int down = 0; down < 2; ++down) mma_float<false, is_16_bit<B>>(c[down][across], rows[down], pair);
      }
    }
  }
}

template <typename A, typename B, typename C, bool AInner, bool BInner>
constexpr int kTileBytes = 2 * (Stage<A, C, AInner>::kBytes + Stage<B, C, BInner>::kBytes);

template <typename C>
__device__ __forceinline__ void clear(TileSums<C>& c) {
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[down][across][i] = 0;
}

// C += A · B over `depth`, a multiple of 32; rows of A and columns of B are 64, of which columns of B from `valid` on
// are taken as zero. `AInner`: A is stored [64, depth], else [depth, 64]; `BInner`: B is stored [64, depth], else
// [depth, 64]. Strides count elements; addresses and strides are multiples of 16 bytes. Needs kTileBytes of dynamic
// shared memory, and all threads of the block.
template <bool AInner, bool BInner, typename A, typename B, typename C>
__device__ __forceinline__ void add_tile_product(TileSums<C>& c, const A* a, int64_t a_stride, const B* b,
                                                 int64_t b_stride, int64_t depth, int64_t valid) {
  using StageA = Stage<A, C, AInner>;
  using StageB = Stage<B, C, BInner>;
  unsigned char* const memory = dynamic_shared<unsigned char>();
  const auto stage_a = [&](int s) { return reinterpret_cast<A*>(memory + s * StageA::kBytes); };
  const auto stage_b = [&](int s) { return reinterpret_cast<B*>(memory + 2 * StageA::kBytes + s * StageB::kBytes); };
  const auto copy = [&](int64_t k, int s) {
    if (k < depth) {
      StageA::copy(stage_a(s), a + (AInner ? k : k * a_stride), a_stride, kTile);
      StageB::copy(stage_b(s), b + (BInner ? k : k * b_stride), b_stride, valid);
    }
    async_commit();
  };
  copy(0, 0);
  int s = 0;
  for (int64_t k = 0; k < depth; k += kDepth<C>) {
    copy(k + kDepth<C>, s ^ 1);
    async_wait<1>();
    __syncthreads();
    multiply_stage<A, B, C, AInner, BInner>(c, stage_a(s), stage_b(s));
    __syncthreads();
    s ^= 1;
  }
  async_wait<0>();
}

}  // namespace msacore
