// Matrix fusion on the device. With h = z_m W_rᵀ / s per token, row i of a pair is Σ_l h[l, i] z_n[l, :]: tiles of
// these rows of all pairs stay in a block, which takes activations, mixing and column means, and no k'×k' matrix
// exists. What is hidden is not loaded.
#pragma once
#include "common/gathered_product.cuh"
#include "matrix_fusion.h"

namespace msacore::matrix_fusion {

constexpr int kThreads = 256, kMaxModalities = 32;
constexpr int kTilesPerBlock = 4;  // column tiles that one block takes

// Sizes, and the arguments that say what is visible. A token is b · L + l.
template <typename T>
struct Problem {
  using A = acc_t<T>;
  const T* x[kMaxModalities];  // [B, L, k] each
  const bool *mask, *available;
  const T *row_weight, *row_bias, *pair_weight, *pair_bias;
  const A* scale;  // [B·L]: 1 / s_b, 0 where masked
  int64_t batch, length, tokens, features, width, rows;
  int modalities, pairs, channels;
  bool augment;
  Activation activation;

  __device__ __forceinline__ bool visible(int m, int64_t b) const {
    return !available || available[b * modalities + m];
  }
  __device__ __forceinline__ bool visible_token(int m, int64_t token) const {
    if (!available) return true;
    return visible(m, static_cast<uint32_t>(token) / static_cast<uint32_t>(length));
  }
  // z_m of a token, zero where hidden; `seen` says whether the token's sample has modality m.
  __device__ __forceinline__ A z(int m, int64_t token, int64_t j, bool seen) const {
    if (j >= width || (mask && !mask[token])) return 0;
    if (j == features) return 1;
    return seen ? static_cast<A>(x[m][token * features + j]) : A(0);
  }
  __device__ __forceinline__ A weight(int64_t i, int64_t j) const {
    return i < rows && j < width ? static_cast<A>(row_weight[i * width + j]) : A(0);
  }
  __device__ __forceinline__ int pair(int m, int n) const { return m * modalities - m * (m + 1) / 2 + n - m - 1; }
  __device__ __forceinline__ bool present(int m, int n, int64_t b) const {
    return augment || (visible(m, b) && visible(n, b));
  }
};

// With σ the logistic function, gelu(x) = x σ(2u), u = sqrt(2/π) (x + 0.044715 x³).
template <typename A>
__device__ __forceinline__ A gelu_gate(A x) {
  return 1 / (1 + exp(A(-1.5957691216057308) * (x + A(0.044715) * x * x * x)));
}

// Comparisons are written so that NaN passes through.
template <typename A>
__device__ __forceinline__ A activate(Activation activation, A x) {
  if (activation == Activation::kRelu) return x < 0 ? A(0) : x;
  return activation == Activation::kGelu ? x * gelu_gate(x) : x;
}

template <typename A>
__device__ __forceinline__ A derivative(Activation activation, A x) {
  if (activation == Activation::kRelu) return x <= 0 ? A(0) : A(1);
  if (activation == Activation::kIdentity) return 1;
  const A gate = gelu_gate(x);
  return gate + x * gate * (1 - gate) * A(1.5957691216057308) * (1 + A(3 * 0.044715) * x * x);
}

// scale [B·L], a warp per sample
template <typename A>
__global__ void __launch_bounds__(kThreads, 4)
    scale_kernel(const bool* __restrict__ mask, A* __restrict__ scale, int64_t batch, int64_t length) {
  for (int64_t b = grid_thread() / kWarp; b < batch; b += grid_threads() / kWarp) {
    int count = 0;
    for (int64_t l = lane_id(); l < length; l += kWarp) count += !mask || mask[b * length + l];
    count = warp_sum(count);
    for (int64_t l = lane_id(); l < length; l += kWarp) {
      const bool valid = !mask || mask[b * length + l];
      scale[b * length + l] = valid ? A(1) / static_cast<A>(count) : A(0);
    }
  }
}

// h[m, token, i] = scale[token] Σ_j z_m[token, j] W[i, j], zero where masked; h [M-1, B·L, q]
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) project_kernel(Problem<T> p, acc_t<T>* __restrict__ h) {
  using A = acc_t<T>;
  using Tile = GatheredProduct<A, 4, 4>;
  MSACORE_SHARED(stage, typename Tile::Stage);
  const int m = static_cast<int>(blockIdx.z);
  const int64_t token0 = int64_t{blockIdx.x} * Tile::kRows, i0 = int64_t{blockIdx.y} * Tile::kColumns;
  Tile tile;
  tile.template add<Along::kDepth, Along::kDepth>(
      stage, p.width,
      [&](int r, int64_t j) {
        const int64_t token = token0 + r;
        return token < p.tokens ? p.z(m, token, j, p.visible_token(m, token)) : A(0);
      },
      [&](int64_t j, int c) { return p.weight(i0 + c, j); });
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t token = token0 + tile.row(r);
    const A scale = token < p.tokens ? p.scale[token] : A(0);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int64_t i = i0 + tile.column(s);
      if (token < p.tokens && i < p.rows)
        h[(m * p.tokens + token) * p.rows + i] = scale == 0 ? 0 : tile.sum[r][s] * scale;
    }
  }
}

// What a block of the pair kernels works on: sample b, rows from i0, some column tiles.
template <typename Tile>
struct Place {
  int64_t b, i0, group, j_begin, j_end;

  template <typename T>
  __device__ Place(const Problem<T>& p, int64_t first_sample) {
    const uint32_t groups = static_cast<uint32_t>(group_count(p.width));
    const uint32_t row_tiles = static_cast<uint32_t>((p.rows + Tile::kRows - 1) / Tile::kRows);
    group = blockIdx.x % groups;
    const uint32_t rest = blockIdx.x / groups;
    i0 = int64_t{rest % row_tiles} * Tile::kRows;
    b = first_sample + rest / row_tiles;
    j_begin = group * kTilesPerBlock * Tile::kColumns;
    j_end = j_begin + kTilesPerBlock * Tile::kColumns;
    if (j_end > p.width) j_end = p.width;
  }
  __host__ __device__ static int64_t group_count(int64_t width) {
    return (width + kTilesPerBlock * Tile::kColumns - 1) / (kTilesPerBlock * Tile::kColumns);
  }
};

// The R·S elements of a tile that belong to this thread, for every pair, in shared memory.
template <typename A, int kElements>
struct Own {
  A* data;
  __device__ __forceinline__ A& at(int pair, int e) const {
    return data[(pair * kElements + e) * kThreads + static_cast<int>(threadIdx.x)];
  }
};

// W_r G_p + c for the tile at rows i0, columns j0 of sample b; 0 outside and for absent pairs.
template <typename Tile, typename T, typename A, int kElements>
__device__ __forceinline__ void pair_rows(const Problem<T>& p, const A* __restrict__ h, int64_t b, int64_t i0,
                                          int64_t j0, typename Tile::Stage& stage, const Own<A, kElements>& own) {
  constexpr int R = Tile::kRows / 16, S = Tile::kColumns / 16;
  const int64_t first = b * p.length;
  for (int m = 0; m + 1 < p.modalities; ++m) {
    for (int n = m + 1; n < p.modalities; ++n) {
      const int pair = p.pair(m, n);
      const bool present = p.present(m, n, b), seen = p.visible(n, b);
      Tile tile;
      if (present) {
        tile.template add<Along::kOther, Along::kOther>(
            stage, p.length,
            [&](int r, int64_t l) { return i0 + r < p.rows ? h[(m * p.tokens + first + l) * p.rows + i0 + r] : A(0); },
            [&](int64_t l, int c) { return p.z(n, first + l, j0 + c, seen); });
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t i = i0 + tile.row(r);
        const A bias = i < p.rows ? static_cast<A>(p.row_bias[i]) : A(0);
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const bool inside = present && i < p.rows && j0 + tile.column(s) < p.width;
          own.at(pair, r * S + s) = inside ? tile.sum[r][s] + bias : A(0);
        }
      }
    }
  }
}

// Sum over the 16 threads that share a row of a tile.
template <typename A>
__device__ __forceinline__ A row_sum(A value) {
  return warp_reduce<16>(value, Sum{});
}

template <int R, int S, typename A>
size_t means_bytes(int64_t pairs, int64_t channels) {
  return (pairs * R * S * kThreads + (pairs + channels) * 16 * R) * sizeof(A);
}

// Sums over the columns of one group of χ_p R_p and S: sums [groups, B, P + C, q]
template <int R, int S, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    means_kernel(Problem<T> p, const acc_t<T>* __restrict__ h, acc_t<T>* __restrict__ sums) {
  using A = acc_t<T>;
  using Tile = GatheredProduct<A, R, S>;
  MSACORE_SHARED(stage, typename Tile::Stage);
  const Own<A, R * S> own{dynamic_shared<A>()};
  A* const total = own.data + p.pairs * R * S * kThreads;  // [P + C, rows of the tile], each kept by one thread
  const Place<Tile> place(p, 0);
  const bool keeper = threadIdx.x % 16 == 0;
  for (int x = 0; keeper && x < p.pairs + p.channels; ++x)
    for (int r = 0; r < R; ++r) total[x * Tile::kRows + Tile::row(r)] = 0;
  for (int64_t j0 = place.j_begin; j0 < place.j_end; j0 += Tile::kColumns) {
    pair_rows<Tile>(p, h, place.b, place.i0, j0, stage, own);
    for (int x = 0; x < p.pairs; ++x) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        A sum = 0;
#pragma unroll
        for (int s = 0; s < S; ++s) {
          A& value = own.at(x, r * S + s);
          value = activate(p.activation, value);
          sum += value;
        }
        sum = row_sum(sum);
        if (keeper) total[x * Tile::kRows + Tile::row(r)] += sum;
      }
    }
    for (int c = 0; c < p.channels; ++c) {
      A mixed[R * S];
      const A bias = static_cast<A>(p.pair_bias[c]);
#pragma unroll
      for (int e = 0; e < R * S; ++e) mixed[e] = bias;
      for (int x = 0; x < p.pairs; ++x) {
        const A weight = static_cast<A>(p.pair_weight[c * p.pairs + x]);
#pragma unroll
        for (int e = 0; e < R * S; ++e) mixed[e] += weight * own.at(x, e);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        A sum = 0;
#pragma unroll
        for (int s = 0; s < S; ++s)
          sum += j0 + Tile::column(s) < p.width ? activate(p.activation, mixed[r * S + s]) : A(0);
        sum = row_sum(sum);
        if (keeper) total[(p.pairs + c) * Tile::kRows + Tile::row(r)] += sum;
      }
    }
  }
  for (int x = 0; keeper && x < p.pairs + p.channels; ++x) {
    for (int r = 0; r < R; ++r) {
      const int64_t i = place.i0 + Tile::row(r);
      if (i < p.rows) {
        sums[((place.group * p.batch + place.b) * (p.pairs + p.channels) + x) * p.rows + i] =
            total[x * Tile::kRows + Tile::row(r)];
      }
    }
  }
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

}  // namespace msacore::matrix_fusion
