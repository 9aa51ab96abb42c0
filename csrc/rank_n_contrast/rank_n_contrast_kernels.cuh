// Rank-N-Contrast on CUDA: distances, and the pull of the factors of pairs on embeddings. Both are tile products on
// tensor cores, of embeddings less their mean, which changes no difference. Near pairs, whose difference would cancel
// in such products, and pairs with a far row are marked, kept out of the products and computed from differences.
#pragma once
#include "rank_n_contrast/rank_n_contrast_centre.cuh"

namespace msacore::rank_n_contrast::cuda {

constexpr int kWordBits = 32, kWordsPerTile = kTile / kWordBits;

// Which pairs are near: a strip's anchors against all samples, a bit each, by anchor [strip, padded / 32] and by sample
// [padded, strip / 32].
struct Near {
  unsigned *by_anchor, *by_sample;
  int64_t samples, anchors;  // words per row of by_anchor and of by_sample

  __device__ bool holds(int64_t anchor, int64_t sample) const {
    return by_anchor[anchor * samples + sample / kWordBits] >> sample % kWordBits & 1;
  }
};

// With ε the error of <x, y> relative to ‖x‖² + ‖y‖², a distance d from products has the relative error
// ε (‖x‖² + ‖y‖²) / d²: no more than 4 ε where d² is at least 1 / kNearShare of the squared norms. The mean of d² over
// all pairs is that of the squared norms, so that few pairs are nearer unless embeddings lie in clusters.
constexpr int kNearShare = 4;
constexpr int kPairLanes = 8;  // lanes that compute the distance of a near pair

template <typename A>
constexpr int kTileBlocks = sizeof(A) == 8 ? 2 : 3;  // per multiprocessor; more would spill registers

// For a far anchor, ‖own - row‖ - ‖own - middle‖ as <middle - row, (own - row) + (own - middle)> / (the sum of both
// distances, `both`), which keeps the digits that the difference of two long distances would cancel. Called by
// kPairLanes neighbouring lanes.
template <typename T>
__device__ __forceinline__ double offset_from(const T* own, const T* row, const T* middle, int64_t d, double both) {
  const double inverse = 1 / both;
  double sum = 0;
  for (int64_t c = lane_id() % kPairLanes; c < d; c += kPairLanes) {
    const double o = as_double(own[c]), r = as_double(row[c]), m = as_double(middle[c]);
    sum += (m - r) * (((o - r) + (o - m)) * inverse);
  }
  return group_sum(sum, kPairLanes);
}

// Grid [column tiles, row tiles of the strip that begins at `first`]: distances [strip, padded] in units, near pairs,
// and, for far anchors, the offsets [strip, padded] that stand for distances where only differences count.
template <typename T, typename A>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<A>)
    distance_kernel(const __grid_constant__ Pool<T, A> pool, int64_t first, A* __restrict__ distance,
                    double* __restrict__ offset, const __grid_constant__ Near near) {
  if (pool.is_idle()) return;
  const Ranked<T>& ranked = pool.ranked;
  MSACORE_SHARED(pair, uint16_t[kTile * kTile]);
  MSACORE_SHARED(listed, int);
  MSACORE_SHARED(of_rows, unsigned[kTile][kWordsPerTile]);
  MSACORE_SHARED(of_columns, unsigned[kTile][kWordsPerTile]);
  const int64_t row = int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile, n = ranked.state->unmasked;
  const int t = thread_in_block(), r = t / kWordsPerTile, word = t % kWordsPerTile;
  of_rows[r][word] = of_columns[r][word] = 0;
  if (t == 0) listed = 0;
  const auto tile = [&](int64_t from) {
    return Matrix<A>{pool.rows + from * pool.width, pool.width, kTile, pool.depth};
  };
  TileSums<A> c;
  clear(c);
  add_tile_product<true, true>(c, tile(first + row), tile(column), pool.depth);
  for_neighbours(c, [&](int i, int j, A left, A right) {
    const int64_t self = first + row + i, other = column + j;
    const A own = pool.square[self];
    const auto apart = [&](int side, A product) -> A {
      const A norms = own + pool.square[other + side], square = norms - 2 * product;
      const bool good = square * kNearShare >= norms && norms < static_cast<A>(INFINITY);
      if (!good && self != other + side && self < n && other + side < n) {
        const int at = j + side;
        pair[atomicAdd(&listed, 1)] = static_cast<uint16_t>(i * kTile + at);
        atomicOr(&of_rows[i][at / kWordBits], 1u << at % kWordBits);
        atomicOr(&of_columns[at][i / kWordBits], 1u << i % kWordBits);
      }
      return square > 0 ? static_cast<A>(sqrt(square)) : A(0);
    };
    store(distance + (row + i) * ranked.padded + other, Vector<A, 2>{apart(0, left), apart(1, right)});
  });
  __syncthreads();
  for (int p = t / kPairLanes; p < listed; p += kTileThreads / kPairLanes) {
    const int i = pair[p] / kTile, j = pair[p] % kTile;
    const int64_t self = first + row + i, at = (row + i) * ranked.padded + column + j;
    const T *x = ranked.embedding(self), *y = ranked.embedding(column + j);
    const double units = ranked.state->to_units, between = distance_between(x, y, ranked.d, kPairLanes);
    if (lane_id() % kPairLanes == 0) distance[at] = static_cast<A>(between * units);
    if (!std::is_same_v<A, double> || !ranked.far(self)) continue;
    const T* const middle = ranked.embedding(ranked.state->middle);
    const double from_middle = offset_from(x, y, middle, ranked.d, between + ranked.norm[self]);
    if (lane_id() % kPairLanes == 0) offset[at] = from_middle * units;
  }
  near.by_anchor[(row + r) * near.samples + column / kWordBits + word] = of_rows[r][word];
  near.by_sample[(column + r) * near.anchors + row / kWordBits + word] = of_columns[r][word];
}

// One block: the sum of `count` anchors' losses, divided by the number of all pairs; 0 without pairs.
template <typename A>
__global__ void __launch_bounds__(kThreads, 1) loss_kernel(const double* __restrict__ losses, int64_t count,
                                                           const State* __restrict__ state, A* __restrict__ out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += losses[i];
  sum = block_sum(sum);
  const double n = static_cast<double>(state->unmasked);
  if (threadIdx.x == 0) *out = static_cast<A>(n > 1 ? sum / (n * (n - 1)) : 0);
}

// One block: the gradient of the temperature from the anchors' Σ slope · distance.
__global__ void __launch_bounds__(kThreads, 1)
    temperature_kernel(const double* __restrict__ sums, int64_t count, const State* __restrict__ state,
                       const double* __restrict__ grad_out, double* __restrict__ grad) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += sums[i];
  sum = block_sum(sum);
  const double n = static_cast<double>(state->unmasked);
  if (threadIdx.x == 0) *grad = n > 1 ? *grad_out / (n * (n - 1)) * sum * state->slope / state->temperature : 0;
}

// Grid [tiles of the width, tiles of samples]: sums ← or += Σ_other a · row_other, for a block's 64 samples, counted
// from row `own` on, and over `others` samples from row `other` on. The factors a belong to the anchors `own`
// (`OfAnchors`: [own, padded]) or to the anchors `other` ([others, padded]).
template <bool OfAnchors, typename A>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<A>)
    pull_kernel(const State* __restrict__ state, const A* __restrict__ rows, int64_t width,
                const A* __restrict__ factors, int64_t padded, int64_t own, int64_t other, int64_t others, bool add,
                A* __restrict__ sums) {
  if (state->precise != std::is_same_v<A, double>) return;
  const int64_t tile = int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  const Matrix<A> factor{factors + (OfAnchors ? tile * padded : tile), padded, OfAnchors ? kTile : others,
                         OfAnchors ? others : kTile};
  TileSums<A> c;
  clear(c);
  add_tile_product<OfAnchors, false>(c, factor, Matrix<A>{rows + other * width + column, width, others, width - column},
                                     others, kTile, width - column);
  for_neighbours(c, [&](int i, int j, A left, A right) {
    if (column + j >= width) return;
    A* const to = sums + (own + tile + i) * width + column + j;
    Vector<A, 2> before{};
    if (add) before = load<2>(to);
    store(to, Vector<A, 2>{before.at[0] + left, before.at[1] + right});
  });
}

// The near pairs of the strip of `size` anchors that begins at `first`: sums -= Σ a (e_own - e_other), a warp per
// sample. factors: those of anchor k and sample j at [k · stride + j].
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, 4)
    near_kernel(const __grid_constant__ Pool<T, A> pool, const __grid_constant__ Near near, int64_t first, int64_t size,
                const double* __restrict__ factors, int64_t stride, A* __restrict__ sums) {
  if (pool.is_idle()) return;
  const Ranked<T>& ranked = pool.ranked;
  const double units = ranked.state->to_units;
  const int64_t n = ranked.state->unmasked, warps = int64_t{gridDim.x} * kWarps;
  for (int64_t p = int64_t{blockIdx.x} * kWarps + warp_id(); p < n; p += warps) {
    const T* const own = ranked.embedding(p);
    // words: which of the samples from row `begin` on are near p; their factors are at from[place · step].
    const auto pull = [&](const unsigned* words, int64_t count, int64_t begin, const double* from, int64_t step) {
      for (int64_t w = 0; w < count; w += kWarp) {
        const unsigned mine = w + lane_id() < count ? words[w + lane_id()] : 0;
        for (unsigned open = __ballot_sync(kAllLanes, mine != 0); open != 0; open &= open - 1) {
          const int source = __ffs(static_cast<int>(open)) - 1;
          for (unsigned bits = __shfl_sync(kAllLanes, mine, source); bits != 0; bits &= bits - 1) {
            const int64_t place = (w + source) * kWordBits + __ffs(static_cast<int>(bits)) - 1;
            const T* const other = ranked.embedding(begin + place);
            const A factor = static_cast<A>(from[place * step]);
            for (int64_t c = lane_id(); c < ranked.d; c += kWarp)
              sums[p * pool.width + c] -= factor * static_cast<A>((as_double(own[c]) - as_double(other[c])) * units);
          }
        }
      }
    };
    const int64_t anchor = p - first;
    if (anchor >= 0 && anchor < size)
      pull(near.by_anchor + anchor * near.samples, near.samples, 0, factors + anchor * stride, 1);
    pull(near.by_sample + p * near.anchors, size / kWordBits, first, factors + p, stride);
  }
}

// grad [count, d] ← Σ a (row_own - row_other) from the sums, a warp each; zeros for masked samples and where there are
// no pairs.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, 4)
    scatter_kernel(const __grid_constant__ Pool<T, A> pool, const A* __restrict__ sums, T* __restrict__ grad) {
  if (pool.is_idle()) return;
  const Ranked<T>& ranked = pool.ranked;
  const int64_t n = ranked.state->unmasked, warps = int64_t{gridDim.x} * kWarps;
  for (int64_t p = int64_t{blockIdx.x} * kWarps + warp_id(); p < ranked.count; p += warps) {
    T* to = grad + ranked.sample[p] * ranked.d;
    const A *row = pool.rows + p * pool.width, *sum = sums + p * pool.width;
    for (int64_t c = lane_id(); c < ranked.d; c += kWarp)
      to[c] = static_cast<T>(p < n && n > 1 ? sum[pool.depth] * row[c] - sum[c] : A(0));
  }
}

}  // namespace msacore::rank_n_contrast::cuda
