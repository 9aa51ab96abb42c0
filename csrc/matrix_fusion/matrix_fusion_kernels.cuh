// Matrix fusion on the device. With h = z_m W_rᵀ / s per token, row i of a pair is Σ_l h[l, i] z_n[l, :]: a block
// computes a tile of these rows on tensor cores, pair after pair, and keeps the mixed channels of the tile in shared
// memory; no k'×k' matrix exists and no pair row is written. What is hidden is not loaded.
//
// Forward, in elements of the features' type: B L k (M - 1) of x are read for h and B L k P for the rows; B L k M of
// these must come from memory, and repeated reads of a sample follow each other. h is written once, B L q (M - 1) per
// part, and read k' / 64 times per pair from the L2 cache; column sums, 4 B q (P + C) k' / 64 bytes, are written and
// read. At B = 256, L = 50, k = 768, q = 64, M = C = 3 in bfloat16: 59 MB of x at least, 79 MB if x_1 is not cached
// between the two kernels that read it, 3 MB for h and 5 MB for the sums. Products: 2 B L k' q (M - 1 + P) = 6.3 GFLOP,
// the minimum of the factored form; whole tiles make it 8 (L to 64, k' to 800).
#pragma once
#include "core/round.h"
#include "cuda/augmented_rows.cuh"
#include "matrix_fusion/matrix_fusion.h"

namespace msacore::matrix_fusion::cuda {
using namespace msacore::cuda;

constexpr int kThreads = 256, kMaxModalities = 32;
constexpr int kLongStages = 4;  // for products over many steps

// For tensor cores, intermediate results are kept as a sum of numbers of the features' type, enough of them to keep the
// errors within those of torch: kParts for h and the gradients of pair rows, kGradParts for the gradients of h, which
// are summed over tokens.
template <typename T>
constexpr int kParts = std::is_same_v<T, Half> ? 2 : 1;
template <typename T>
constexpr int kGradParts = is_16_bit<T> ? 2 : 1;

// Stores neighbours in parts that lie `stride` apart.
template <int Parts, typename T, typename A>
__device__ __forceinline__ void store_parts(T* to, int64_t stride, A first, A second) {
#pragma unroll
  for (int part = 0; part < Parts; ++part) {
    const Vector<T, 2> kept{static_cast<T>(first), static_cast<T>(second)};
    store(to + part * stride, kept);
    first -= static_cast<A>(kept.at[0]);
    second -= static_cast<A>(kept.at[1]);
  }
}

template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;  // on a multiprocessor, at least
template <typename T>
constexpr int kPairKernelBlocks = sizeof(T) == 8 ? 1 : 2;

__host__ __device__ inline int64_t tiles_of(int64_t extent) { return ceil_div(extent, kTile); }

// Sizes, and the arguments that say what is visible. A token is b · L + l.
template <typename T>
struct Problem {
  using A = acc_t<T>;
  const T* x[kMaxModalities];  // [B, L, k] each
  const bool *mask, *available;
  const T *row_weight, *row_bias, *pair_weight, *pair_bias;
  const T* weights;  // `row_weight` in rows of width_stride: zeros beyond k'
  const A* scale;    // [B·L]: 1 / s_b, 0 where masked
  int64_t batch, length, tokens, features, width, rows;
  int64_t width_stride, row_stride;  // k' and q padded to 16 bytes
  int modalities, pairs, channels;
  bool augment, aligned;  // `aligned`: rows of x begin at multiples of 16 bytes
  Activation activation;

  __device__ __forceinline__ bool visible(int m, int64_t b) const {
    return !available || available[b * modalities + m];
  }
  __device__ __forceinline__ int pair(int m, int n) const { return m * modalities - m * (m + 1) / 2 + n - m - 1; }
  __device__ __forceinline__ bool present(int m, int n, int64_t b) const {
    return augment || (visible(m, b) && visible(n, b));
  }
  // h, or its gradients, of modality m from `token` and row i on.
  __device__ __forceinline__ Matrix<T> tokens_from(const T* h, int part, int m, int64_t token, int64_t count,
                                                   int64_t i) const {
    return {h + ((int64_t{part} * (modalities - 1) + m) * tokens + token) * row_stride + i, row_stride, count,
            row_stride - i};
  }
  // Elements of one part of h.
  __device__ __forceinline__ int64_t h_size() const { return (modalities - 1) * tokens * row_stride; }
  // The weights from row i and column j on.
  __device__ __forceinline__ Matrix<T> weights_from(int64_t i, int64_t j) const {
    return {weights + i * width_stride + j, width_stride, rows - i, width_stride - j};
  }
};

// z_m of `count` tokens from `first` on, from column `column0` on: an operand of a product.
template <typename T>
struct Tokens {
  using Element = T;
  const Problem<T>& p;
  int m;
  int64_t first, count, column0;

  __device__ __forceinline__ void copy16(T* to, int64_t row, int64_t column) const {
    const int64_t token = first + row, j = column0 + column;
    const bool valid = row < count && !(p.mask && !p.mask[token]);
    const bool seen =
        valid && (!p.available || p.visible(m, static_cast<uint32_t>(token) / static_cast<uint32_t>(p.length)));
    copy_augmented(to, p.x[m], token, j, p.features, seen, valid && p.augment, p.aligned);
  }
};

// With σ the logistic function, gelu(x) = x σ(2u), u = sqrt(2/π) (x + 0.044715 x³). `gate` is σ, `slope` its derivative
// σ (1 - σ), from the exponential: 1 - σ would lose all digits where σ is near 1.
template <typename A>
struct GeluGate {
  A gate, slope;

  __device__ __forceinline__ explicit GeluGate(A x) {
    const A two_u = A(1.5957691216057308) * (x + A(0.044715) * x * x * x);
    const A e = exp(two_u < 0 ? two_u : -two_u), inverse = 1 / (1 + e);
    gate = (two_u < 0 ? e : A(1)) * inverse;
    slope = e * inverse * inverse;
  }
};

// Comparisons are written so that NaN passes through.
template <typename A>
__device__ __forceinline__ A activate(Activation activation, A x) {
  if (activation == Activation::kRelu) return x < 0 ? A(0) : x;
  return activation == Activation::kGelu ? x * GeluGate<A>(x).gate : x;
}

template <typename A>
__device__ __forceinline__ A derivative(Activation activation, A x) {
  if (activation == Activation::kRelu) return x <= 0 ? A(0) : A(1);
  if (activation == Activation::kIdentity) return 1;
  const GeluGate<A> sigma(x);
  const A square = x * x < 1000 ? x * x : A(1000);  // beyond, the slope is 0, and x² may be inf
  return sigma.gate + x * sigma.slope * A(1.5957691216057308) * (1 + A(3 * 0.044715) * square);
}

// scale [B·L], a warp per sample, and the padded weights
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    prepare_kernel(const __grid_constant__ Problem<T> p, acc_t<T>* __restrict__ scale, T* __restrict__ weights) {
  using A = acc_t<T>;
  for (int64_t b = grid_thread() / kWarp; b < p.batch; b += grid_threads() / kWarp) {
    int count = 0;
    for (int64_t l = lane_id(); l < p.length; l += kWarp) count += !p.mask || p.mask[b * p.length + l];
    count = warp_sum(count);
    for (int64_t l = lane_id(); l < p.length; l += kWarp) {
      const bool valid = !p.mask || p.mask[b * p.length + l];
      scale[b * p.length + l] = valid ? A(1) / static_cast<A>(count) : A(0);
    }
  }
  for (int64_t at = grid_thread(); at < p.rows * p.width_stride; at += grid_threads()) {
    const int64_t i = at / p.width_stride, j = at - i * p.width_stride;
    weights[at] = j < p.width ? p.row_weight[i * p.width + j] : T(0.0f);
  }
}

template <typename T>
constexpr int kProjectBytes = kTileBytes<T, T, acc_t<T>, true, true, kLongStages>;

// h[m, token, i] = scale[token] Σ_j z_m[token, j] W[i, j], zero where masked; h [parts, M-1, B·L, q] in rows of
// row_stride. Grid [token tiles, row tiles, M-1].
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T>)
    project_kernel(const __grid_constant__ Problem<T> p, T* __restrict__ h) {
  using A = acc_t<T>;
  const int m = static_cast<int>(blockIdx.z);
  const int64_t token0 = int64_t{blockIdx.x} * kTile, i0 = int64_t{blockIdx.y} * kTile, count = p.tokens - token0;
  TileSums<A> c;
  clear(c);
  add_tile_product<true, true, kLongStages>(c, Tokens<T>{p, m, token0, count, 0}, p.weights_from(i0, 0), p.width, count,
                                            p.rows - i0);
  for_neighbours(c, [&](int row, int column, A first, A second) {
    const int64_t i = i0 + column;
    if (row >= count || i >= p.row_stride) return;
    const A scale = p.scale[token0 + row];
    store_parts<kParts<T>>(h + (m * p.tokens + token0 + row) * p.row_stride + i, p.h_size(),
                           scale == 0 || i >= p.rows ? A(0) : first * scale,
                           scale == 0 || i + 1 >= p.rows ? A(0) : second * scale);
  });
}

// What a block of the pair kernels works on: `rows` from i0 and `columns` from j0 on, of sample b.
struct Place {
  int64_t b, i0, j0;
  int rows, columns;
  uint32_t column_tile;

  template <typename T>
  __device__ Place(const Problem<T>& p, int64_t first_sample) {
    const uint32_t column_tiles = static_cast<uint32_t>(tiles_of(p.width));
    const uint32_t row_tiles = static_cast<uint32_t>(tiles_of(p.rows));
    column_tile = blockIdx.x % column_tiles;
    const uint32_t rest = blockIdx.x / column_tiles;
    j0 = int64_t{column_tile} * kTile;
    i0 = int64_t{rest % row_tiles} * kTile;
    b = first_sample + rest / row_tiles;
    rows = static_cast<int>(p.rows - i0 < kTile ? p.rows - i0 : kTile);
    columns = static_cast<int>(p.width - j0 < kTile ? p.width - j0 : kTile);
  }
  __device__ __forceinline__ bool inside(int down, int across, int i) const {
    return tile_row(down, i) < rows && tile_column(across, i) < columns;
  }
};

template <typename T>
constexpr int kPairBytes = kTileBytes<T, T, acc_t<T>, false, false>;

// Dynamic shared memory of the pair kernels behind the product's stages: a number per row, and for some channels the
// elements of the tile, each of which only its thread uses.
template <typename T>
struct PairMemory {
  using A = acc_t<T>;
  static constexpr int kTogether = kPer16<A>;
  static constexpr int kBytes = kPairBytes<T> + kTile * sizeof(A), kChannelBytes = kTile * kTile * sizeof(A);

  __device__ A* rows() const { return reinterpret_cast<A*>(dynamic_shared<unsigned char>() + kPairBytes<T>); }
  __device__ A* at(int channel, int down, int across, int i) const {
    const int group = ((down * 4 + across) * 4 + i) / kTogether;
    return rows() + kTile + channel * kTile * kTile + (group * kTileThreads + thread_in_block()) * kTogether;
  }

  // Calls body(values, down, across, i) for the values of a channel, kTogether at a time.
  template <typename Body>
  __device__ __forceinline__ void for_each(int channel, const Body& body) const {
#pragma unroll
    for (int down = 0; down < 2; ++down)
#pragma unroll
      for (int across = 0; across < 4; ++across)
#pragma unroll
        for (int i = 0; i < 4; i += kTogether) body(at(channel, down, across, i), down, across, i);
  }
};

// c ← a tile of W_r G_p + c 1ᵀ of the pair (m, n), zero outside and for absent pairs. Called by all threads.
template <typename T>
__device__ __forceinline__ void pair_rows(TileSums<acc_t<T>>& c, const Problem<T>& p, const T* __restrict__ h,
                                          const Place& place, int m, int n) {
  using A = acc_t<T>;
  clear(c);
  const bool present = p.present(m, n, place.b);
  if (present) {
    const int64_t first = place.b * p.length;
#pragma unroll 1
    for (int part = 0; part < kParts<T>; ++part)
      add_tile_product<false, false>(c, p.tokens_from(h, part, m, first, p.length, place.i0),
                                     Tokens<T>{p, n, first, p.length, place.j0}, p.length, place.rows, place.columns);
  }
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = tile_row(down, i);
      const A bias = row < place.rows ? static_cast<A>(p.row_bias[place.i0 + row]) : A(0);
#pragma unroll
      for (int across = 0; across < 4; ++across) {
        const bool inside = present && place.inside(down, across, i);
        A& value = c[down][across][i];
        value = inside ? value + bias : A(0);
      }
    }
}

template <typename A>
__device__ __forceinline__ void activate_all(Activation activation, TileSums<A>& c) {
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[down][across][i] = activate(activation, c[down][across][i]);
}

// Calls body(m, n, pair) for every pair.
template <typename T, typename Body>
__device__ __forceinline__ void for_pairs(const Problem<T>& p, const Body& body) {
  int pair = 0;
  for (int m = 0; m + 1 < p.modalities; ++m)
    for (int n = m + 1; n < p.modalities; ++n) body(m, n, pair++);
}

// Adds a pair's share V[c, p] χ_p R_p to `count` channels from `first` on, which begin with e[c] at the first pair.
template <typename T>
__device__ __forceinline__ void mix(const PairMemory<T>& memory, const Problem<T>& p, int first, int count, int pair,
                                    const TileSums<acc_t<T>>& c) {
  using A = acc_t<T>;
  constexpr int kTogether = PairMemory<T>::kTogether;
  for (int channel = 0; channel < count; ++channel) {
    const A weight = static_cast<A>(p.pair_weight[(first + channel) * p.pairs + pair]);
    const A bias = static_cast<A>(p.pair_bias[first + channel]);
    memory.for_each(channel, [&](A* at, int down, int across, int i) {
      Vector<A, kTogether> mixed;
      if (pair > 0) mixed = load<kTogether>(at);
#pragma unroll
      for (int e = 0; e < kTogether; ++e)
        mixed.at[e] = (pair > 0 ? mixed.at[e] : bias) + weight * c[down][across][i + e];
      store(at, mixed);
    });
  }
}

// A thread's sums over the rows of a tile in which it has elements; sum r is that of row tile_row(r / 2, r % 2 * 2).
template <typename A>
using RowSums = A[4];

template <typename A>
__device__ __forceinline__ void add_rows(RowSums<A>& sums, const TileSums<A>& c) {
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[down * 2 + i / 2] += c[down][across][i];
}

// to[row] ← the sum over all threads, for the first `count` rows. Called by all threads; `shared` is [kTile].
template <typename A>
__device__ __forceinline__ void write_rows(RowSums<A>& sums, A* shared, A* to, int count) {
  const bool first = lane_id() % 4 == 0, left = warp_id() % 2 == 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) sums[r] = warp_reduce<4>(sums[r], Sum{});
  __syncthreads();  // the readers of an earlier call are done
#pragma unroll
  for (int r = 0; r < 4; ++r)
    if (first && !left) shared[tile_row(r / 2, r % 2 * 2)] = sums[r];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = tile_row(r / 2, r % 2 * 2);
    if (first && left && row < count) to[row] = sums[r] + shared[row];
  }
}

// Sums over the columns of one tile of χ_p R_p and S: sums [column tiles, B, P + C, q]. `together` channels at a time.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kPairKernelBlocks<T>)
    means_kernel(const __grid_constant__ Problem<T> p, const T* __restrict__ h, acc_t<T>* __restrict__ sums,
                 int together) {
  using A = acc_t<T>;
  const PairMemory<T> memory;
  const Place place(p, 0);
  A* const to = sums + (place.column_tile * p.batch + place.b) * (p.pairs + p.channels) * p.rows + place.i0;
  int first = 0;
  do {
    const int count = p.channels - first < together ? p.channels - first : together;
    for_pairs(p, [&](int m, int n, int pair) {
      TileSums<A> c;
      pair_rows(c, p, h, place, m, n);
      activate_all(p.activation, c);
      mix(memory, p, first, count, pair, c);
      if (first > 0) return;
      RowSums<A> row_sums{};
      add_rows(row_sums, c);
      write_rows(row_sums, memory.rows(), to + pair * p.rows, place.rows);
    });
    for (int channel = 0; channel < count; ++channel) {
      RowSums<A> row_sums{};
      memory.for_each(channel, [&](A* at, int down, int across, int i) {
        const auto mixed = load<PairMemory<T>::kTogether>(at);
#pragma unroll
        for (int e = 0; e < PairMemory<T>::kTogether; ++e) {
          const bool inside = tile_column(across, i + e) < place.columns;
          row_sums[down * 2 + (i + e) / 2] += inside ? activate(p.activation, mixed.at[e]) : A(0);
        }
      });
      write_rows(row_sums, memory.rows(), to + (p.pairs + first + channel) * p.rows, place.rows);
    }
    first += count;
  } while (first < p.channels);
}

// Column means from the sums of the groups, in their order: pairs [B, P, q], fused [B, C, q]
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    finish_kernel(const acc_t<T>* __restrict__ sums, T* __restrict__ pairs, T* __restrict__ fused, int64_t batch,
                  int64_t pair_count, int64_t channels, int64_t rows, int64_t groups, int64_t width) {
  const int64_t per_sample = (pair_count + channels) * rows, count = batch * per_sample;
  for (int64_t at = grid_thread(); at < count; at += grid_threads()) {
    acc_t<T> sum = 0;
    for (int64_t g = 0; g < groups; ++g) sum += sums[g * count + at];
    const T mean = static_cast<T>(sum / static_cast<acc_t<T>>(width));
    const int64_t b = at / per_sample, rest = at - b * per_sample, own = pair_count * rows;
    if (rest < own)
      pairs[b * own + rest] = mean;
    else
      fused[b * channels * rows + rest - own] = mean;
  }
}

}  // namespace msacore::matrix_fusion::cuda
