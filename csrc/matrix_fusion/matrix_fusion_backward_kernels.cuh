// Gradients of matrix fusion on the device. The pair rows of some samples are computed again and replaced by their
// gradients in global memory (q×k' per pair); four products over them on tensor cores give the rest.
//
// The gradients of the rows, B P q k' elements per part, are written once and read twice; a launch takes no more
// samples than fit in the L2 cache. x is read, in units of B L k elements, M - 1 times each for h and for the weights,
// P times for the gradients of h and 2 P times for the rows; its gradients are written once. At B = 256, L = 50,
// k = 768, q = 64, M = C = 3 in bfloat16: 118 MB of x and its gradients at least, and 76 MB of gradients of rows.
// Products, in units of 2 B L k' q = 1.3 GFLOP: 3 P + 3 (M - 1) = 15 is the minimum of the factored form that stores no
// rows; here the rows are computed twice, so that a block keeps C tiles instead of C + P, and the gradients of h have
// two parts: 4 P + 5 (M - 1) = 22.
#pragma once
#include "matrix_fusion/matrix_fusion_kernels.cuh"

namespace msacore::matrix_fusion::cuda {

// The gradients of a call's results; memory for the gradients of the pair rows, and for the shares of warps and blocks
// in the gradients of the small parameters.
template <typename T>
struct RowGrads {
  const T *fused, *pairs;               // [B, C, q], [B, P, q]
  T* rows;                              // k' times the gradients, [parts, samples, P, q, k'] in rows of width_stride
  int64_t rows_size;                    // of one part
  acc_t<T>*mix_share, *row_bias_share;  // [B, row tiles, column tiles, warps, C·P + C], [B, column tiles, q]

  // `rows` of a pair, the sample-th of the launch, from row i and column j on.
  __device__ __forceinline__ Matrix<T> from(const Problem<T>& p, int part, int64_t sample, int pair, int64_t i,
                                            int64_t j) const {
    return {rows + part * rows_size + ((sample * p.pairs + pair) * p.rows + i) * p.width_stride + j, p.width_stride,
            p.rows - i, p.width_stride - j};
  }
};

// From the gradients of the means to those of the pre-activations, for samples from `first_sample` on, `together`
// channels at a time. The factor 1 / k' of the mean is left to the kernels that read `rows`: float16 would lose small
// gradients.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kPairKernelBlocks<T>)
    row_grads_kernel(const __grid_constant__ Problem<T> p, const T* __restrict__ h, const RowGrads<T> grads,
                     int64_t first_sample, int together) {
  using A = acc_t<T>;
  constexpr int kTogether = PairMemory<T>::kTogether;
  const PairMemory<T> memory;
  const Place place(p, first_sample);
  const int64_t blocks_before = first_sample * tiles_of(p.rows) * tiles_of(p.width);
  A* const mix_share = grads.mix_share +
                       ((blocks_before + blockIdx.x) * (kTileThreads / kWarp) + warp_id()) * p.channels * (p.pairs + 1);
  const A share = A(1) / static_cast<A>(p.width);
  // The gradient of a mean, at this thread's rows.
  const auto of_means = [&](RowSums<A>& to, const T* from) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = tile_row(r / 2, r % 2 * 2);
      to[r] = row < place.rows ? static_cast<A>(from[row]) : A(0);
    }
  };
  const int stored_columns = static_cast<int>(p.width_stride - place.j0 < kTile ? p.width_stride - place.j0 : kTile);
  RowSums<A> bias_sums{};
  int first = 0;
  do {
    const int count = p.channels - first < together ? p.channels - first : together;
#pragma unroll 1
    for (int sweep = 0; sweep < 2; ++sweep) {  // over pairs, first for the channels, then for the gradients
      for_pairs(p, [&](int m, int n, int pair) {
        TileSums<A> c;
        pair_rows(c, p, h, place, m, n);
        if (sweep == 0) {
          activate_all(p.activation, c);
          mix(memory, p, first, count, pair, c);
          return;
        }
        const bool present = p.present(m, n, place.b);
        RowSums<A> of_mean{};
        if (first == 0) of_means(of_mean, grads.pairs + (place.b * p.pairs + pair) * p.rows + place.i0);
        T* const rows =
            grads.rows + (((place.b - first_sample) * p.pairs + pair) * p.rows + place.i0) * p.width_stride + place.j0;
#pragma unroll
        for (int down = 0; down < 2; ++down)
#pragma unroll
          for (int across = 0; across < 4; ++across) {
            A grad[4] = {of_mean[down * 2], of_mean[down * 2], of_mean[down * 2 + 1], of_mean[down * 2 + 1]};
            for (int channel = 0; channel < count; ++channel) {
              const A weight = static_cast<A>(p.pair_weight[(first + channel) * p.pairs + pair]);
#pragma unroll
              for (int i = 0; i < 4; i += kTogether) {
                const auto values = load<kTogether>(memory.at(channel, down, across, i));
#pragma unroll
                for (int e = 0; e < kTogether; ++e) grad[i + e] += weight * values.at[e];
              }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const bool counts = present && place.inside(down, across, i);
              grad[i] = counts ? grad[i] * derivative(p.activation, c[down][across][i]) : A(0);
              bias_sums[down * 2 + i / 2] += grad[i];
            }
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
              const int row = tile_row(down, i), column = tile_column(across, i);
              if (row >= place.rows || column >= stored_columns) continue;
              T* const to = rows + row * p.width_stride + column;
              A left = grad[i], right = grad[i + 1];
#pragma unroll
              for (int part = 0; first > 0 && part < kParts<T>; ++part) {
                const auto before = load<2>(to + part * grads.rows_size);
                left += static_cast<A>(before.at[0]);
                right += static_cast<A>(before.at[1]);
              }
              store_parts<kParts<T>>(to, grads.rows_size, left, right);
            }
          }
        activate_all(p.activation, c);
        for (int channel = 0; channel < count; ++channel) {
          A dot = 0;
          memory.for_each(channel, [&](A* at, int down, int across, int i) {
            const auto values = load<kTogether>(at);
#pragma unroll
            for (int e = 0; e < kTogether; ++e) dot += values.at[e] * c[down][across][i + e];
          });
          dot = warp_sum(dot);
          if (lane_id() == 0) mix_share[(first + channel) * p.pairs + pair] = dot * share;
        }
      });
      if (sweep == 0) {
        for (int channel = 0; channel < count; ++channel) {  // from S before its activation to the gradient there
          RowSums<A> of_mean;
          of_means(of_mean, grads.fused + (place.b * p.channels + first + channel) * p.rows + place.i0);
          A sum = 0;
          memory.for_each(channel, [&](A* at, int down, int across, int i) {
            auto values = load<kTogether>(at);
#pragma unroll
            for (int e = 0; e < kTogether; ++e) {
              A& value = values.at[e];
              value = place.inside(down, across, i + e)
                          ? of_mean[down * 2 + (i + e) / 2] * derivative(p.activation, value)
                          : A(0);
              sum += value;
            }
            store(at, values);
          });
          sum = warp_sum(sum);
          if (lane_id() == 0) mix_share[p.channels * p.pairs + first + channel] = sum * share;
        }
      }
    }
    first += count;
  } while (first < p.channels);
#pragma unroll
  for (int r = 0; r < 4; ++r) bias_sums[r] *= share;
  write_rows(bias_sums, memory.rows(),
             grads.row_bias_share + (place.b * tiles_of(p.width) + place.column_tile) * p.rows + place.i0, place.rows);
}

// The tiles of a product per sample: columns change fastest, then rows, then members, then samples.
struct TilePlace {
  int64_t row0, column0, sample;
  int member;

  __device__ TilePlace(int64_t rows, int64_t columns, int members) {
    const uint32_t row_tiles = static_cast<uint32_t>(tiles_of(rows));
    const uint32_t column_tiles = static_cast<uint32_t>(tiles_of(columns));
    uint32_t rest = blockIdx.x;
    column0 = int64_t{rest % column_tiles} * kTile;
    rest /= column_tiles;
    row0 = int64_t{rest % row_tiles} * kTile;
    rest /= row_tiles;
    member = static_cast<int>(rest % static_cast<uint32_t>(members));
    sample = rest / static_cast<uint32_t>(members);
  }
};

// grad_h[m, token, i] = scale[token] Σ_{n > m} Σ_j z_n[token, j] row_grads[b, (m, n), i, j] / k', as h is stored
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T>)
    h_grads_kernel(const __grid_constant__ Problem<T> p, const RowGrads<T> grads, T* __restrict__ grad_h,
                   int64_t first_sample) {
  using A = acc_t<T>;
  const TilePlace place(p.length, p.rows, p.modalities - 1);
  const int64_t b = first_sample + place.sample, first = b * p.length + place.row0, count = p.length - place.row0;
  const int64_t i0 = place.column0;
  const int m = place.member;
  TileSums<A> c;
  clear(c);
  for (int n = m + 1; n < p.modalities; ++n) {
    if (!p.present(m, n, b)) continue;
#pragma unroll 1
    for (int part = 0; part < kParts<T>; ++part)
      add_tile_product<true, true, kLongStages>(c, Tokens<T>{p, n, first, count, 0},
                                                grads.from(p, part, place.sample, p.pair(m, n), i0, 0), p.width, count,
                                                p.rows - i0);
  }
  const A share = A(1) / static_cast<A>(p.width);
  for_neighbours(c, [&](int row, int column, A left, A right) {
    const int64_t i = i0 + column;
    if (row >= count || i >= p.row_stride) return;
    const A scale = p.scale[first + row] * share;
    store_parts<kGradParts<T>>(grad_h + (m * p.tokens + first + row) * p.row_stride + i, p.h_size(),
                               scale == 0 || i >= p.rows ? A(0) : left * scale,
                               scale == 0 || i + 1 >= p.rows ? A(0) : right * scale);
  });
}

template <typename T>
struct FeatureGrads {
  T* at[kMaxModalities];  // [B, L, k] each
};

template <typename T>
constexpr int kFeatureBytes = kTileBytes<T, T, acc_t<T>, true, false>;

// grad_x_n[token, j] = Σ_{m < n} Σ_i h[m, token, i] row_grads[b, (m, n), i, j] / k' + Σ_i grad_h[n, token, i] W[i, j]
template <typename T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 2 ? 3 : 2)
    feature_grads_kernel(const __grid_constant__ Problem<T> p, const T* __restrict__ h, const RowGrads<T> grads,
                         const T* __restrict__ grad_h, const __grid_constant__ FeatureGrads<T> grad_x,
                         int64_t first_sample) {
  using A = acc_t<T>;
  const TilePlace place(p.length, p.features, p.modalities);
  const int64_t b = first_sample + place.sample, first = b * p.length + place.row0, count = p.length - place.row0;
  const int64_t j0 = place.column0;
  const int n = place.member;
  const bool seen = p.visible(n, b);
  TileSums<A> c;
  clear(c);
  for (int m = 0; seen && m < n; ++m) {
    if (!p.present(m, n, b)) continue;
#pragma unroll 1
    for (int parts = 0; parts < kParts<T> * kParts<T>; ++parts) {
      const int of_h = parts / kParts<T>, of_grads = parts % kParts<T>;
      if (of_h + of_grads < kParts<T>)  // the products left out are as small as what no part holds
        add_tile_product<true, false>(c, p.tokens_from(h, of_h, m, first, count, 0),
                                      grads.from(p, of_grads, place.sample, p.pair(m, n), 0, j0), p.rows, count,
                                      p.features - j0);
    }
  }
  const A share = A(1) / static_cast<A>(p.width);
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[down][across][i] *= share;
#pragma unroll 1
  for (int part = 0; seen && n + 1 < p.modalities && part < kGradParts<T>; ++part)
    add_tile_product<true, false>(c, p.tokens_from(grad_h, part, n, first, count, 0), p.weights_from(0, j0), p.rows,
                                  count, p.features - j0);
  T* const to = grad_x.at[n] + first * p.features + j0;
  for_neighbours(c, [&](int row, int column, A left, A right) {
    if (row >= count) return;
    const bool valid = seen && (!p.mask || p.mask[first + row]);
    store_neighbours(to + row * p.features + column, static_cast<T>(valid ? left : A(0)),
                     static_cast<T>(valid ? right : A(0)), p.features - j0 - column, p.features % 2 == 0);
  });
}

template <typename T>
constexpr int kWeightBytes = kTileBytes<T, T, acc_t<T>, false, false, kLongStages>;

// Shares of grad_W[i, j] = Σ_m Σ_token grad_h[m, token, i] z_m[token, j] from `part` tokens each: [parts, M-1, q, k'].
// Grid [tiles, M-1, parts].
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T>)
    weight_grads_kernel(const __grid_constant__ Problem<T> p, const T* __restrict__ grad_h,
                        acc_t<T>* __restrict__ shares, int64_t part) {
  using A = acc_t<T>;
  const int m = static_cast<int>(blockIdx.y);
  const uint32_t column_tiles = static_cast<uint32_t>(tiles_of(p.width));
  const int64_t i0 = int64_t{blockIdx.x / column_tiles} * kTile, j0 = int64_t{blockIdx.x % column_tiles} * kTile;
  const int64_t first = blockIdx.z * part, count = first + part < p.tokens ? part : p.tokens - first;
  TileSums<A> c;
  clear(c);
#pragma unroll 1
  for (int part = 0; part < kGradParts<T>; ++part)
    add_tile_product<false, false, kLongStages>(c, p.tokens_from(grad_h, part, m, first, count, i0),
                                                Tokens<T>{p, m, first, count, j0}, count, p.rows - i0, p.width - j0);
  A* const to = shares + ((int64_t{blockIdx.z} * (p.modalities - 1) + m) * p.rows + i0) * p.width + j0;
  for_neighbours(c, [&](int row, int column, A left, A right) {
    if (i0 + row < p.rows)
      store_neighbours(to + row * p.width + column, left, right, p.width - j0 - column, p.width % 2 == 0);
  });
}

}  // namespace msacore::matrix_fusion::cuda
