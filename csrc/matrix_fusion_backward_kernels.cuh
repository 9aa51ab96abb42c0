// Gradients of matrix fusion on the device. The pair rows of some samples are computed again and replaced by their
// gradients in global memory (q×k' per pair); four products over them, all gathers, give the rest.
#pragma once
#include "matrix_fusion_kernels.cuh"

namespace msacore::matrix_fusion {

template <int R, int S, typename A>
size_t row_grads_bytes(int64_t pairs, int64_t channels) {
  return (2 * pairs * R * S * kThreads + kThreads / kWarp * channels * (pairs + 1) + 16 * R) * sizeof(A);
}

// Gradients of a call's results, and where a block leaves its share of those of the small parameters.
template <typename T>
struct RowGrads {
  const T *fused, *pairs;                      // [B, C, q], [B, P, q]
  acc_t<T>*rows, *mix_share, *row_bias_share;  // [samples, P, q, k'], [B, row tiles, groups, C·P + C], [B, groups, q]
};

// From the gradients of the means to those of the pre-activations, for samples from `first_sample` on.
template <int R, int S, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    row_grads_kernel(Problem<T> p, const acc_t<T>* __restrict__ h, RowGrads<T> grads, int64_t first_sample) {
  using A = acc_t<T>;
  using Tile = GatheredProduct<A, R, S>;
  constexpr int kElements = R * S, kWarps = kThreads / kWarp;
  MSACORE_SHARED(stage, typename Tile::Stage);
  const Own<A, kElements> pre{dynamic_shared<A>()}, grad{pre.data + p.pairs * kElements * kThreads};
  const int mixes = p.channels * (p.pairs + 1);
  A* const mix_sum = grad.data + p.pairs * kElements * kThreads;  // [warps, C·P + C], each kept by a warp's first lane
  A* const bias_sum = mix_sum + kWarps * mixes;                   // [rows of the tile], each kept by one thread
  A* const warp_mix = mix_sum + warp_id() * mixes;
  const Place<Tile> place(p, first_sample);
  const bool keeper = threadIdx.x % 16 == 0, first_lane = lane_id() == 0;
  for (int x = 0; first_lane && x < mixes; ++x) warp_mix[x] = 0;
  for (int r = 0; keeper && r < R; ++r) bias_sum[Tile::row(r)] = 0;
  const A share = A(1) / static_cast<A>(p.width);

  for (int64_t j0 = place.j_begin; j0 < place.j_end; j0 += Tile::kColumns) {
    pair_rows<Tile>(p, h, place.b, place.i0, j0, stage, pre);
    const auto inside = [&](int r, int s) {
      return place.i0 + Tile::row(r) < p.rows && j0 + Tile::column(s) < p.width;
    };
    for (int x = 0; x < p.pairs; ++x) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t i = place.i0 + Tile::row(r);
        const A of_mean = i < p.rows ? share * static_cast<A>(grads.pairs[(place.b * p.pairs + x) * p.rows + i]) : A(0);
#pragma unroll
        for (int s = 0; s < S; ++s) grad.at(x, r * S + s) = of_mean;
      }
    }
    for (int c = 0; c < p.channels; ++c) {
      A mixed[kElements], all = 0;
      const A bias = static_cast<A>(p.pair_bias[c]);
#pragma unroll
      for (int e = 0; e < kElements; ++e) mixed[e] = bias;
      for (int x = 0; x < p.pairs; ++x) {
        const A weight = static_cast<A>(p.pair_weight[c * p.pairs + x]);
#pragma unroll
        for (int e = 0; e < kElements; ++e) mixed[e] += weight * activate(p.activation, pre.at(x, e));
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t i = place.i0 + Tile::row(r);
        const A of_mean =
            i < p.rows ? share * static_cast<A>(grads.fused[(place.b * p.channels + c) * p.rows + i]) : A(0);
#pragma unroll
        for (int s = 0; s < S; ++s) {
          A& value = mixed[r * S + s];
          value = inside(r, s) ? of_mean * derivative(p.activation, value) : A(0);
          all += value;
        }
      }
      all = warp_sum(all);
      if (first_lane) warp_mix[p.channels * p.pairs + c] += all;
      for (int x = 0; x < p.pairs; ++x) {
        const A weight = static_cast<A>(p.pair_weight[c * p.pairs + x]);
        A dot = 0;
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          dot += mixed[e] * activate(p.activation, pre.at(x, e));
          grad.at(x, e) += weight * mixed[e];
        }
        dot = warp_sum(dot);
        if (first_lane) warp_mix[c * p.pairs + x] += dot;
      }
    }
    for (int m = 0; m + 1 < p.modalities; ++m) {
      for (int n = m + 1; n < p.modalities; ++n) {
        const int x = p.pair(m, n);
        const bool present = p.present(m, n, place.b);
        A* const rows = grads.rows + ((place.b - first_sample) * p.pairs + x) * p.rows * p.width;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          A sum = 0;
#pragma unroll
          for (int s = 0; s < S; ++s) {
            if (!inside(r, s)) continue;
            const A value = present ? grad.at(x, r * S + s) * derivative(p.activation, pre.at(x, r * S + s)) : A(0);
            rows[(place.i0 + Tile::row(r)) * p.width + j0 + Tile::column(s)] = value;
            sum += value;
          }
          sum = row_sum(sum);
          if (keeper) bias_sum[Tile::row(r)] += sum;
        }
      }
    }
  }
  const int64_t groups = Place<Tile>::group_count(p.width);
  const int64_t row_tiles = (p.rows + Tile::kRows - 1) / Tile::kRows;
  for (int r = 0; keeper && r < R; ++r) {
    const int64_t i = place.i0 + Tile::row(r);
    if (i < p.rows) grads.row_bias_share[(place.b * groups + place.group) * p.rows + i] = bias_sum[Tile::row(r)];
  }
  __syncthreads();
  const int64_t block = (place.b * row_tiles + place.i0 / Tile::kRows) * groups + place.group;
  for (int x = thread_in_block(); x < mixes; x += kThreads) {
    A sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += mix_sum[w * mixes + x];
    grads.mix_share[block * mixes + x] = sum;
  }
}

// The tiles of a product per sample: columns change fastest, then rows, then members, then samples.
struct TilePlace {
  int64_t row0, column0, sample;
  int member;

  __device__ TilePlace(int64_t row_tiles, int64_t column_tiles, int members, int tile_rows, int tile_columns) {
    uint32_t rest = blockIdx.x;
    column0 = int64_t{rest % static_cast<uint32_t>(column_tiles)} * tile_columns;
    rest /= static_cast<uint32_t>(column_tiles);
    row0 = int64_t{rest % static_cast<uint32_t>(row_tiles)} * tile_rows;
    rest /= static_cast<uint32_t>(row_tiles);
    member = static_cast<int>(rest % static_cast<uint32_t>(members));
    sample = rest / static_cast<uint32_t>(members);
  }
};

__host__ __device__ inline int64_t tiles_of(int64_t extent, int tile) { return (extent + tile - 1) / tile; }

// grad_h[m, token, i] = scale[token] Σ_{n > m} Σ_j z_n[token, j] row_grads[b, (m, n), i, j]
template <int R, typename T>
__global__ void __launch_bounds__(kThreads, 2) h_grads_kernel(Problem<T> p, const acc_t<T>* __restrict__ row_grads,
                                                              acc_t<T>* __restrict__ grad_h, int64_t first_sample) {
  using A = acc_t<T>;
  using Tile = GatheredProduct<A, R, 4>;
  MSACORE_SHARED(stage, typename Tile::Stage);
  const TilePlace place(tiles_of(p.length, Tile::kRows), tiles_of(p.rows, Tile::kColumns), p.modalities - 1,
                        Tile::kRows, Tile::kColumns);
  const int64_t b = first_sample + place.sample;
  const int m = place.member;
  Tile tile;
  for (int n = m + 1; n < p.modalities; ++n) {
    if (!p.present(m, n, b)) continue;
    const bool seen = p.visible(n, b);
    const A* const grads = row_grads + (place.sample * p.pairs + p.pair(m, n)) * p.rows * p.width;
    tile.template add<Along::kDepth, Along::kDepth>(
        stage, p.width,
        [&](int r, int64_t j) {
          const int64_t l = place.row0 + r;
          return l < p.length ? p.z(n, b * p.length + l, j, seen) : A(0);
        },
        [&](int64_t j, int c) {
          const int64_t i = place.column0 + c;
          return i < p.rows ? grads[i * p.width + j] : A(0);
        });
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t l = place.row0 + tile.row(r), token = b * p.length + l;
    const A scale = l < p.length ? p.scale[token] : A(0);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int64_t i = place.column0 + tile.column(s);
      if (l < p.length && i < p.rows)
        grad_h[(m * p.tokens + token) * p.rows + i] = scale == 0 ? 0 : tile.sum[r][s] * scale;
    }
  }
}

template <typename T>
struct FeatureGrads {
  T* at[kMaxModalities];  // [B, L, k] each
};

// grad_x_n[token, j] = Σ_{m < n} Σ_i h[m, token, i] row_grads[b, (m, n), i, j] + Σ_i grad_h[n, token, i] W[i, j]
template <int R, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    feature_grads_kernel(Problem<T> p, const acc_t<T>* __restrict__ h, const acc_t<T>* __restrict__ row_grads,
                         const acc_t<T>* __restrict__ grad_h, FeatureGrads<T> grad_x, int64_t first_sample) {
  using A = acc_t<T>;
  using Tile = GatheredProduct<A, R, 4>;
  MSACORE_SHARED(stage, typename Tile::Stage);
  const TilePlace place(tiles_of(p.length, Tile::kRows), tiles_of(p.features, Tile::kColumns), p.modalities,
                        Tile::kRows, Tile::kColumns);
  const int64_t b = first_sample + place.sample, first = b * p.length;
  const int n = place.member;
  const bool seen = p.visible(n, b);
  const auto of_token = [&](const A* rows, int m) {
    return [=, &p](int r, int64_t i) {
      const int64_t l = place.row0 + r;
      return l < p.length ? rows[(m * p.tokens + first + l) * p.rows + i] : A(0);
    };
  };
  Tile tile;
  for (int m = 0; seen && m < n; ++m) {
    if (!p.present(m, n, b)) continue;
    const A* const grads = row_grads + (place.sample * p.pairs + p.pair(m, n)) * p.rows * p.width;
    tile.template add<Along::kDepth, Along::kOther>(stage, p.rows, of_token(h, m), [&](int64_t i, int c) {
      const int64_t j = place.column0 + c;
      return j < p.features ? grads[i * p.width + j] : A(0);
    });
  }
  if (seen && n + 1 < p.modalities) {
    tile.template add<Along::kDepth, Along::kOther>(stage, p.rows, of_token(grad_h, n),
                                                    [&](int64_t i, int c) { return p.weight(i, place.column0 + c); });
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t l = place.row0 + tile.row(r), token = first + l;
    const bool valid = seen && l < p.length && (!p.mask || p.mask[token]);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int64_t j = place.column0 + tile.column(s);
      if (l < p.length && j < p.features)
        grad_x.at[n][token * p.features + j] = static_cast<T>(valid ? tile.sum[r][s] : A(0));
    }
  }
}

// Shares of grad_W[i, j] = Σ_m Σ_token grad_h[m, token, i] z_m[token, j] from `part` tokens each: [parts, M-1, q, k']
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) weight_grads_kernel(Problem<T> p, const acc_t<T>* __restrict__ grad_h,
                                                                   acc_t<T>* __restrict__ shares, int64_t part) {
  using A = acc_t<T>;
  using Tile = GatheredProduct<A, 4, 4>;
  MSACORE_SHARED(stage, typename Tile::Stage);
  const int m = static_cast<int>(blockIdx.y);
  const int64_t column_tiles = tiles_of(p.width, Tile::kColumns);
  const int64_t i0 = blockIdx.x / column_tiles * Tile::kRows, j0 = blockIdx.x % column_tiles * Tile::kColumns;
  const int64_t first = blockIdx.z * part;
  const int64_t count = first + part < p.tokens ? part : p.tokens - first;
  Tile tile;
  tile.template add<Along::kOther, Along::kOther>(
      stage, count,
      [&](int r, int64_t t) { return i0 + r < p.rows ? grad_h[(m * p.tokens + first + t) * p.rows + i0 + r] : A(0); },
      [&](int64_t t, int c) { return p.z(m, first + t, j0 + c, p.visible_token(m, first + t)); });
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int64_t i = i0 + tile.row(r), j = j0 + tile.column(s);
      if (i < p.rows && j < p.width)
        shares[((int64_t{blockIdx.z} * (p.modalities - 1) + m) * p.rows + i) * p.width + j] = tile.sum[r][s];
    }
  }
}

}  // namespace msacore::matrix_fusion
