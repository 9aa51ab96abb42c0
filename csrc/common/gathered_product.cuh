// Products of matrices that are given by functions of their indices, so that what is hidden is zero without a load.
#pragma once
#include "common/device.cuh"

namespace msacore {

// The direction in which neighbouring threads load an operand: along the inner dimension or across it.
enum class Along { kDepth, kOther };

// A [16·R, 16·S] tile in the registers of a block of 256 threads; a thread has R neighbouring rows and every 16th
// column.
template <typename A, int R, int S>
struct GatheredProduct {
  static constexpr int kThreads = 256, kSide = 16, kRows = kSide * R, kColumns = kSide * S, kDepth = 16;

  struct alignas(32) Stage {
    A left[kDepth][kRows + 4], right[kDepth][kColumns + 4];
  };

  A sum[R][S] = {};

  static __device__ __forceinline__ int row(int r) { return static_cast<int>(threadIdx.x) / kSide * R + r; }
  static __device__ __forceinline__ int column(int s) { return static_cast<int>(threadIdx.x) % kSide + kSide * s; }

  // sum += Σ_k left(row, k) · right(k, column) over k < depth. Called by the whole block; the functions see rows and
  // columns of the whole tile.
  template <Along kLeft, Along kRight, typename Left, typename Right>
  __device__ __forceinline__ void add(Stage& stage, int64_t depth, const Left& left, const Right& right) {
    A left_next[R], right_next[S];
    fetch<kLeft, kRows>(left_next, 0, depth, [&](int i, int64_t k) { return left(i, k); });
    fetch<kRight, kColumns>(right_next, 0, depth, [&](int j, int64_t k) { return right(k, j); });
    for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
      __syncthreads();  // the readers of the stage before are done
#pragma unroll
      for (int i = 0; i < R; ++i) stage.left[inner<kLeft, kRows>(i)][outer<kLeft, kRows>(i)] = left_next[i];
#pragma unroll
      for (int i = 0; i < S; ++i) stage.right[inner<kRight, kColumns>(i)][outer<kRight, kColumns>(i)] = right_next[i];
      __syncthreads();
      fetch<kLeft, kRows>(left_next, k0 + kDepth, depth, [&](int i, int64_t k) { return left(i, k); });
      fetch<kRight, kColumns>(right_next, k0 + kDepth, depth, [&](int j, int64_t k) { return right(k, j); });
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k) {
        const auto l = load<R>(&stage.left[k][row(0)]);
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const A b = stage.right[k][column(s)];
#pragma unroll
          for (int r = 0; r < R; ++r) sum[r][s] += l.at[r] * b;
        }
      }
    }
  }

 private:
  // Place in the stage of this thread's element i.
  template <Along kAlong, int kExtent>
  static __device__ __forceinline__ int inner(int i) {
    const int t = static_cast<int>(threadIdx.x);
    return kAlong == Along::kDepth ? t % kDepth : (t + i * kThreads) / kExtent;
  }
  template <Along kAlong, int kExtent>
  static __device__ __forceinline__ int outer(int i) {
    const int t = static_cast<int>(threadIdx.x);
    return kAlong == Along::kDepth ? t / kDepth + i * kSide : (t + i * kThreads) % kExtent;
  }
  template <Along kAlong, int kExtent, int kCount, typename Operand>
  static __device__ __forceinline__ void fetch(A (&to)[kCount], int64_t k0, int64_t depth, const Operand& operand) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t k = k0 + inner<kAlong, kExtent>(i);
      to[i] = k < depth ? operand(outer<kAlong, kExtent>(i), k) : A(0);
    }
  }
};

}  // namespace msacore
