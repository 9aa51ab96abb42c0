// Low-rank fusion on the device: products in tiles on tensor cores, one pass over elements between them. The features
// of a missing modality are not loaded.
//
// Forward: the projections, 4 M r B h bytes, are written and read; features are read h r / 64 times, factors B / 64
// times, mostly from the L2 cache. Backward: the projections are read or, where they were not kept, computed again;
// their gradients are written once and read twice. At B = 1024, d = h = 128, r = 16, M = 3 in 16 bits: 25 MB of
// projections, against 2.6 MB of features, factors and results. Multiplications: 2 B h r Σ (d_m + 1), 1.6 GFLOP, which
// is the minimum, forward, and twice that backward (three times without kept projections); with tiles of 64, the 129
// rows of the gradients of factors take 192.
#pragma once
#include "core/round.h"
#include "cuda/augmented_rows.cuh"

namespace msacore::low_rank_fusion::cuda {
using namespace msacore::cuda;

constexpr int kThreads = 256, kMaxModalities = 32;
constexpr int kLongStages = 4;  // for products over many steps

template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;  // on a multiprocessor, at least

__host__ __device__ inline int64_t tiles_of(int64_t extent) { return ceil_div(extent, kTile); }

template <typename T>
struct Problem {
  using A = acc_t<T>;
  const T *x[kMaxModalities], *factors[kMaxModalities];  // [B, d_m], [r, d_m + 1, h]
  int64_t features[kMaxModalities];
  bool aligned[kMaxModalities];  // rows of x_m begin at multiples of 16 bytes
  bool factors_aligned;          // so do the rows of all factors
  const T *rank_weight, *bias;
  const bool* available;
  int64_t batch, rank, width;
  int64_t width_stride;  // of projections and their gradients
  int modalities;

  __device__ __forceinline__ bool has(int64_t b, int m) const { return !available || available[b * modalities + m]; }
  __device__ __forceinline__ int64_t member(int m, int64_t r) const { return (m * rank + r) * batch * width_stride; }
  // factors_m[r] from row k and column j on
  __device__ __forceinline__ Matrix<T> factor(int m, int64_t r, int64_t k, int64_t j) const {
    const int64_t rows = features[m] + 1;
    return {factors[m] + (r * rows + k) * width + j, width, rows - k, width - j, factors_aligned};
  }
  // The gradient of a[m, r] from sample b and column j on
  __device__ __forceinline__ Matrix<A> grad(const A* grad_a, int m, int64_t r, int64_t b, int64_t j) const {
    return {grad_a + member(m, r) + b * width_stride + j, width_stride, batch - b, width_stride - j};
  }
};

// [x_m; 1] of the samples from `first` on, from column `column0` on: an operand of a product.
template <typename T>
struct Samples {
  using Element = T;
  const Problem<T>& p;
  int m;
  int64_t first, column0;

  __device__ __forceinline__ void copy16(T* to, int64_t row, int64_t column) const {
    const int64_t b = first + row;
    const bool inside = b < p.batch;
    copy_augmented(to, p.x[m], b, column0 + column, p.features[m], inside && p.has(b, m), inside, p.aligned[m]);
  }
};

// The matrices of all ranks side by side, the columns of each padded to whole stages.
template <typename T>
struct Ranks {
  using Element = T;
  Matrix<T> first;
  int64_t distance;  // between ranks, in elements
  uint32_t columns;

  __device__ __forceinline__ void copy16(T* to, int64_t row, int64_t column) const {
    const uint32_t r = static_cast<uint32_t>(column) / columns;
    Matrix<T> matrix = first;
    matrix.from += r * distance;
    matrix.copy16(to, row, column - int64_t{r} * columns);
  }
};

// The tile of a block: columns change faster than rows.
struct TilePlace {
  int64_t row0, column0;
  __device__ TilePlace(int64_t columns)
      : row0(blockIdx.x / tiles_of(columns) * kTile), column0(blockIdx.x % tiles_of(columns) * kTile) {}
};

template <typename T>
constexpr int kProjectBytes = kTileBytes<T, T, acc_t<T>, true, false>;

// a[m, r] = [x_m; 1] factors_m[r], a [M, r, B, width_stride] with zeros from h on; a block's r and m are its y and z
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T>)
    project_kernel(const __grid_constant__ Problem<T> p, acc_t<T>* __restrict__ a) {
  using A = acc_t<T>;
  const TilePlace place(p.width);
  const int64_t r = blockIdx.y;
  const int m = static_cast<int>(blockIdx.z);
  const int64_t rows = p.batch - place.row0, columns = p.width - place.column0;
  TileSums<A> c;
  clear(c);
  add_tile_product<true, false>(c, Samples<T>{p, m, place.row0, 0}, p.factor(m, r, 0, place.column0), p.features[m] + 1,
                                rows, columns);
  A* const to = a + p.member(m, r) + place.row0 * p.width_stride + place.column0;
  const int64_t stored = p.width_stride - place.column0;
  for_neighbours(c, [&](int row, int column, A left, A right) {
    if (row < rows) store_neighbours(to + row * p.width_stride + column, left, right, stored - column, true);
  });
}

// out = bias + Σ_r rank_weight[r] Π_m a[m, r], [B, h]
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    combine_kernel(const __grid_constant__ Problem<T> p, const acc_t<T>* __restrict__ a, T* __restrict__ out) {
  using A = acc_t<T>;
  const int64_t count = p.batch * p.width;
  for (int64_t at = grid_thread(); at < count; at += grid_threads()) {
    const int64_t b = at / p.width, j = at - b * p.width, from = b * p.width_stride + j;
    A sum = static_cast<A>(p.bias[j]);
    for (int64_t r = 0; r < p.rank; ++r) {
      A product = static_cast<A>(p.rank_weight[r]);
      for (int m = 0; m < p.modalities; ++m) product *= a[p.member(m, r) + from];
      sum += product;
    }
    out[at] = static_cast<T>(sum);
  }
}

// grad_a[m, r] = rank_weight[r] · grad_out · Π_{n ≠ m} a[n, r], laid out as a, and per block the share
// [blocks, r] of the gradient of rank_weight[r]; a block's r is its y.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    combine_backward_kernel(const __grid_constant__ Problem<T> p, const T* __restrict__ grad_out,
                            const acc_t<T>* __restrict__ a, acc_t<T>* __restrict__ grad_a,
                            acc_t<T>* __restrict__ shares) {
  using A = acc_t<T>;
  const int64_t count = p.batch * p.width_stride, r = blockIdx.y;
  const A weight = static_cast<A>(p.rank_weight[r]);
  A dot = 0;
  for (int64_t at = grid_thread(); at < count; at += grid_threads()) {
    const int64_t b = at / p.width_stride, j = at - b * p.width_stride;
    const bool inside = j < p.width;
    const A grad = inside ? static_cast<A>(grad_out[b * p.width + j]) : A(0);
    for (int m = 0; m < p.modalities; ++m) {
      A others = grad;
      for (int n = 0; inside && n < p.modalities; ++n)
        if (n != m) others *= a[p.member(n, r) + at];
      if (inside && m == 0) dot += others * a[p.member(0, r) + at];
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

template <typename T>
constexpr int kFactorBytes = kTileBytes<acc_t<T>, T, acc_t<T>, false, false, kLongStages>;

// grad_factors_m[r] = [x_m; 1]ᵀ grad_a[m, r], as the transposed grad_a[m, r]ᵀ [x_m; 1], whose left operand may be of
// the wider type; a block's r and m are its y and z, blocks beyond d_m + 1 columns do nothing
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T>)
    factor_grads_kernel(const __grid_constant__ Problem<T> p, const acc_t<T>* __restrict__ grad_a,
                        const __grid_constant__ Gradients<T> grads, int64_t widest) {
  using A = acc_t<T>;
  const TilePlace place(widest + 1);
  const int64_t r = blockIdx.y;
  const int m = static_cast<int>(blockIdx.z);
  const int64_t rows = p.width - place.row0, columns = p.features[m] + 1 - place.column0;
  if (columns <= 0) return;
  TileSums<A> c;
  clear(c);
  add_tile_product<false, false, kLongStages>(c, p.grad(grad_a, m, r, 0, place.row0),
                                              Samples<T>{p, m, 0, place.column0}, p.batch, rows, columns);
  T* const to = grads.factors[m] + (r * (p.features[m] + 1) + place.column0) * p.width + place.row0;
  for_neighbours(c, [&](int j, int k, A first, A second) {
    if (j >= rows) return;
    if (k < columns) to[k * p.width + j] = static_cast<T>(first);
    if (k + 1 < columns) to[(k + 1) * p.width + j] = static_cast<T>(second);
  });
}

template <typename T>
constexpr int kFeatureBytes = kTileBytes<acc_t<T>, T, acc_t<T>, true, true, kLongStages>;

// grad_x_m = Σ_r grad_a[m, r] factors_m[r]ᵀ without its last row, zero where hidden; a block's m is its z, blocks
// beyond the columns of x_m do nothing
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T>)
    feature_grads_kernel(const __grid_constant__ Problem<T> p, const acc_t<T>* __restrict__ grad_a,
                         const __grid_constant__ Gradients<T> grads, int64_t widest) {
  using A = acc_t<T>;
  const TilePlace place(widest);
  const int m = static_cast<int>(blockIdx.z);
  const int64_t d = p.features[m], rows = p.batch - place.row0, columns = d - place.column0;
  if (columns <= 0) return;
  const uint32_t stages = static_cast<uint32_t>(round_up(p.width, kDepth<A>));
  TileSums<A> c;
  clear(c);
  add_tile_product<true, true, kLongStages>(
      c, Ranks<A>{p.grad(grad_a, m, 0, place.row0, 0), p.batch * p.width_stride, stages},
      Ranks<T>{p.factor(m, 0, place.column0, 0), (d + 1) * p.width, stages}, p.rank * stages, rows, columns);
  T* const to = grads.features[m] + place.row0 * d + place.column0;
  for_neighbours(c, [&](int row, int column, A left, A right) {
    if (row >= rows) return;
    const bool has = p.has(place.row0 + row, m);
    store_neighbours(to + row * d + column, static_cast<T>(has ? left : A(0)), static_cast<T>(has ? right : A(0)),
                     columns - column, d % 2 == 0);
  });
}

}  // namespace msacore::low_rank_fusion::cuda
