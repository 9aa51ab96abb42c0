// Low-rank fusion on the device: products in tiles, one pass over elements between them. The features of a missing
// modality are not loaded.
#pragma once
#include "common/gathered_product.cuh"

namespace msacore::low_rank_fusion {

constexpr int kThreads = 256, kMaxModalities = 32;

__host__ __device__ inline int64_t tiles_of(int64_t extent, int tile) { return (extent + tile - 1) / tile; }

template <typename T>
struct Problem {
  using A = acc_t<T>;
  const T *x[kMaxModalities], *factors[kMaxModalities];  // [B, d_m], [r, d_m + 1, h]
  int64_t features[kMaxModalities];
  const T *rank_weight, *bias;
  const bool* available;
  int64_t batch, rank, width;
  int modalities;

  __device__ __forceinline__ bool has(int64_t b, int m) const { return !available || available[b * modalities + m]; }
  // [x_m; 1] of sample b, zero where hidden
  __device__ __forceinline__ A z(int m, int64_t b, int64_t k) const {
    if (b >= batch || k > features[m]) return 0;
    if (k == features[m]) return 1;
    return has(b, m) ? static_cast<A>(x[m][b * features[m] + k]) : A(0);
  }
  __device__ __forceinline__ A factor(int m, int64_t r, int64_t k, int64_t j) const {
    return k <= features[m] && j < width ? static_cast<A>(factors[m][(r * (features[m] + 1) + k) * width + j]) : A(0);
  }
  __device__ __forceinline__ int64_t member(int m, int64_t r) const { return (m * rank + r) * batch * width; }
};

template <typename T>
using Tile = GatheredProduct<acc_t<T>, 4, 4>;

// The tile of a block: columns change faster than rows.
struct TilePlace {
  int64_t row0, column0;
  __device__ TilePlace(int64_t columns, int tile)
      : row0(blockIdx.x / tiles_of(columns, tile) * tile), column0(blockIdx.x % tiles_of(columns, tile) * tile) {}
};

// a[m, r] = [x_m; 1] factors_m[r], a [M, r, B, h]; a block's r and m are its y and z
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) project_kernel(Problem<T> p, acc_t<T>* __restrict__ a) {
  MSACORE_SHARED(stage, typename Tile<T>::Stage);
  const TilePlace place(p.width, 64);
  const int64_t r = blockIdx.y;
  const int m = static_cast<int>(blockIdx.z);
  Tile<T> tile;
  tile.template add<Along::kDepth, Along::kOther>(
      stage, p.features[m] + 1, [&](int i, int64_t k) { return p.z(m, place.row0 + i, k); },
      [&](int64_t k, int j) { return p.factor(m, r, k, place.column0 + j); });
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int64_t b = place.row0 + tile.row(i), j = place.column0 + tile.column(s);
      if (b < p.batch && j < p.width) a[p.member(m, r) + b * p.width + j] = tile.sum[i][s];
    }
  }
}

// out = bias + Σ_r rank_weight[r] Π_m a[m, r], [B, h]
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    combine_kernel(Problem<T> p, const acc_t<T>* __restrict__ a, T* __restrict__ out) {
  using A = acc_t<T>;
  const int64_t count = p.batch * p.width;
  for (int64_t at = grid_thread(); at < count; at += grid_threads()) {
    A sum = static_cast<A>(p.bias[at % p.width]);
    for (int64_t r = 0; r < p.rank; ++r) {
      A product = static_cast<A>(p.rank_weight[r]);
      for (int m = 0; m < p.modalities; ++m) product *= a[p.member(m, r) + at];
      sum += product;
    }
    out[at] = static_cast<T>(sum);
  }
}

// grad_a[m, r] = rank_weight[r] · grad_out · Π_{n ≠ m} a[n, r], and per block the share [blocks, r] of the gradient of
// rank_weight[r]; a block's r is its y.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    combine_backward_kernel(Problem<T> p, const T* __restrict__ grad_out, const acc_t<T>* __restrict__ a,
                            acc_t<T>* __restrict__ grad_a, acc_t<T>* __restrict__ shares) {
  using A = acc_t<T>;
  const int64_t count = p.batch * p.width, r = blockIdx.y;
  const A weight = static_cast<A>(p.rank_weight[r]);
  A dot = 0;
  for (int64_t at = grid_thread(); at < count; at += grid_threads()) {
    const A grad = static_cast<A>(grad_out[at]);
    for (int m = 0; m < p.modalities; ++m) {
      A others = grad;
      for (int n = 0; n < p.modalities; ++n)
        if (n != m) others *= a[p.member(n, r) + at];
      if (m == 0) dot += others * a[p.member(0, r) + at];
      grad_a[p.member(m, r) + at] = weight * others;
    }
  }
  dot = block_sum(dot);
  if (thread_in_block() == 0) shares[blockIdx.x * p.rank + r] = dot;
}

template <typename T>
struct Gradients {
  T *features[kMaxModalities], *factors[kMaxModalities];
};

// grad_factors_m[r] = [x_m; 1]ᵀ grad_a[m, r]; a block's r and m are its y and z, blocks beyond d_m + 1 rows rest
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    factor_grads_kernel(Problem<T> p, const acc_t<T>* __restrict__ grad_a, Gradients<T> grads) {
  MSACORE_SHARED(stage, typename Tile<T>::Stage);
  const TilePlace place(p.width, 64);
  const int64_t r = blockIdx.y;
  const int m = static_cast<int>(blockIdx.z);
  const int64_t rows = p.features[m] + 1;
  Tile<T> tile;
  tile.template add<Along::kOther, Along::kOther>(
      stage, place.row0 < rows ? p.batch : 0, [&](int i, int64_t b) { return p.z(m, b, place.row0 + i); },
      [&](int64_t b, int j) {
        return place.column0 + j < p.width ? grad_a[p.member(m, r) + b * p.width + place.column0 + j] : acc_t<T>(0);
      });
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int64_t k = place.row0 + tile.row(i), j = place.column0 + tile.column(s);
      if (k < rows && j < p.width) grads.factors[m][(r * rows + k) * p.width + j] = static_cast<T>(tile.sum[i][s]);
    }
  }
}

// grad_x_m = Σ_r grad_a[m, r] factors_m[r]ᵀ without its last row, zero where hidden; a block's m is its z, blocks
// beyond the columns of x_m rest
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    feature_grads_kernel(Problem<T> p, const acc_t<T>* __restrict__ grad_a, Gradients<T> grads, int64_t widest) {
  MSACORE_SHARED(stage, typename Tile<T>::Stage);
  const TilePlace place(widest, 64);
  const int m = static_cast<int>(blockIdx.z);
  const int64_t d = p.features[m];
  Tile<T> tile;
  for (int64_t r = 0; place.column0 < d && r < p.rank; ++r) {
    tile.template add<Along::kDepth, Along::kDepth>(
        stage, p.width,
        [&](int i, int64_t j) {
          const int64_t b = place.row0 + i;
          return b < p.batch ? grad_a[p.member(m, r) + b * p.width + j] : acc_t<T>(0);
        },
        [&](int64_t j, int k) { return p.factor(m, r, place.column0 + k, j); });
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int64_t b = place.row0 + tile.row(i), k = place.column0 + tile.column(s);
      if (b < p.batch && k < d)
        grads.features[m][b * d + k] = static_cast<T>(p.has(b, m) ? tile.sum[i][s] : acc_t<T>(0));
    }
  }
}

}  // namespace msacore::low_rank_fusion
