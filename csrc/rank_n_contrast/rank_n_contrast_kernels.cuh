// Rank-N-Contrast on CUDA: samples in order of their targets, distances, and what factors of pairs pull at embeddings.
// Both are tile products on tensor cores, of embeddings less their mean, which changes no difference. Near pairs, whose
// difference such products would cancel away, are marked, kept out and taken by differences.
#pragma once
#include "cuda/rows.cuh"
#include "cuda/tile_product.cuh"

namespace msacore::rank_n_contrast::cuda {
using namespace msacore::cuda;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kMeanThreads = 1024, kMeanWarps = kMeanThreads / kWarp;
constexpr int kWordBits = 32, kWordsPerTile = kTile / kWordBits;

// The samples by rising target: unmasked ones in order, targets that are no numbers last; then the masked.
template <typename T>
struct Ranked {
  using A = acc_t<T>;
  const T* embeddings;    // [count, d], as they came
  int64_t count, padded;  // all samples, and that in whole tiles
  int64_t d, depth;       // of an embedding, and that padded with zeros to 16 bytes
  int64_t width;          // that and 16 bytes more, the first element 1: a product with such rows sums the factors too
  int64_t* sample;        // [count]: which one
  A* mean;                // [d]: of the unmasked embeddings, 0 where that is no number
  A* rows;                // [padded, width]: embeddings less the mean, zeros from `unmasked` on
  A* square;              // [padded]: their squared norms
  int64_t* unmasked;      // how many

  __device__ const T* embedding(int64_t place) const { return embeddings + sample[place] * d; }
};

// Grid [⌈d / 32⌉]: a lane owns a column, the warps share the rows.
template <typename T>
__global__ void __launch_bounds__(kMeanThreads, 1)
    embedding_mean_kernel(const bool* __restrict__ mask, const __grid_constant__ Ranked<T> ranked) {
  using A = acc_t<T>;
  MSACORE_SHARED(partial, double[kMeanWarps][kWarp + 1]);
  MSACORE_SHARED(counts, int[kMeanWarps]);
  const int64_t c = int64_t{blockIdx.x} * kWarp + lane_id();
  double sum = 0;
  int count = 0;
#pragma unroll 8
  for (int64_t i = warp_id(); i < ranked.count; i += kMeanWarps) {
    const bool unmasked = !mask || mask[i];
    count += unmasked;
    if (unmasked && c < ranked.d) sum += static_cast<double>(static_cast<A>(ranked.embeddings[i * ranked.d + c]));
  }
  partial[warp_id()][lane_id()] = sum;
  if (lane_id() == 0) counts[warp_id()] = count;
  __syncthreads();
  if (warp_id() > 0) return;
  for (int w = 1; w < kMeanWarps; ++w) {
    sum += partial[w][lane_id()];
    count += counts[w];
  }
  const double mean = sum / count;
  if (c < ranked.d) ranked.mean[c] = mean - mean == 0 ? static_cast<A>(mean) : A(0);
}

// Blocks of 256 samples count those before each, then move their embeddings. target [count]: the targets in order.
template <typename T, typename Target>
__global__ void __launch_bounds__(kThreads, 4)
    rank_kernel(const Target* __restrict__ targets, const bool* __restrict__ mask,
                const __grid_constant__ Ranked<T> ranked, acc_t<Target>* __restrict__ target) {
  using A = acc_t<T>;
  using Y = acc_t<Target>;
  enum Kind : int { kNumber, kNaN, kMasked };
  MSACORE_SHARED(value, Y[kThreads]);
  MSACORE_SHARED(kind, int[kThreads]);
  MSACORE_SHARED(place, int64_t[kThreads]);
  const auto kind_of = [&](int64_t i, Y& y) -> int {
    y = 0;
    if (mask && !mask[i]) return kMasked;
    y = static_cast<Y>(targets[i]);
    return y == y ? kNumber : kNaN;
  };
  for (int64_t first = int64_t{blockIdx.x} * kThreads; first < ranked.padded; first += grid_threads()) {
    const int64_t i = first + threadIdx.x;
    Y own = 0;
    const int own_kind = i < ranked.count ? kind_of(i, own) : kMasked;
    int64_t before = 0, unmasked = 0;
    for (int64_t start = 0; start < ranked.count; start += kThreads) {
      __syncthreads();
      const int64_t j = start + threadIdx.x;
      if (j < ranked.count) kind[threadIdx.x] = kind_of(j, value[threadIdx.x]);
      __syncthreads();
      const int size = static_cast<int>(min(ranked.count - start, int64_t{kThreads}));
      for (int k = 0; k < size; ++k) {
        const bool same = kind[k] == own_kind && (own_kind != kNumber || value[k] == own);
        const bool less = kind[k] < own_kind || (kind[k] == own_kind && own_kind == kNumber && value[k] < own);
        before += less || (same && start + k < i);
        unmasked += kind[k] != kMasked;
      }
    }
    __syncthreads();
    place[threadIdx.x] = i < ranked.count ? before : i;
    kind[threadIdx.x] = own_kind;
    if (i < ranked.count) {
      ranked.sample[before] = i;
      target[before] = own;
    }
    if (i == 0) *ranked.unmasked = unmasked;
    __syncthreads();
    for (int r = warp_id(); r < kThreads && first + r < ranked.padded; r += kWarps) {
      A* to = ranked.rows + place[r] * ranked.width;
      const T* from = ranked.embeddings + (first + r) * ranked.d;
      A square = 0;
      for (int64_t c = lane_id(); c < ranked.width; c += kWarp) {
        A value = 0;
        if (kind[r] != kMasked) value = c < ranked.d ? static_cast<A>(from[c]) - ranked.mean[c] : A(c == ranked.depth);
        to[c] = value;
        if (c < ranked.d) square += value * value;
      }
      square = warp_sum(square);
      if (lane_id() == 0) ranked.square[place[r]] = square;
    }
  }
}

// Which pairs are near: a strip's anchors against all samples, a bit each, by anchor [strip, padded / 32] and by sample
// [padded, strip / 32].
struct Near {
  unsigned *by_anchor, *by_sample;
  int64_t samples, anchors;  // words of a row of either

  __device__ bool holds(int64_t anchor, int64_t sample) const {
    return by_anchor[anchor * samples + sample / kWordBits] >> sample % kWordBits & 1;
  }
};

// With ε for the error of <x, y> against ‖x‖² + ‖y‖², a distance d from products errs by ε (‖x‖² + ‖y‖²) / d² of
// itself: no more than 4 ε where d² is at least this share of the squared norms. The mean of d² over all pairs is that
// of the squared norms, so that few pairs are nearer unless embeddings lie in clusters.
constexpr int kNearShare = 4;
constexpr int kPairLanes = 8;  // that find the distance of a near pair

template <typename A>
constexpr int kTileBlocks = sizeof(A) == 8 ? 2 : 3;  // of a multiprocessor: more would spill registers

// Grid [column tiles, row tiles of the strip that begins at `first`]: distances [strip, padded], and near pairs.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<acc_t<T>>)
    distance_kernel(const __grid_constant__ Ranked<T> ranked, int64_t first, acc_t<T>* __restrict__ distance,
                    const __grid_constant__ Near near) {
  using A = acc_t<T>;
  MSACORE_SHARED(pair, uint16_t[kTile * kTile]);
  MSACORE_SHARED(listed, int);
  MSACORE_SHARED(of_rows, unsigned[kTile][kWordsPerTile]);
  MSACORE_SHARED(of_columns, unsigned[kTile][kWordsPerTile]);
  const int64_t row = int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile, n = *ranked.unmasked;
  const int t = thread_in_block(), r = t / kWordsPerTile, word = t % kWordsPerTile;
  of_rows[r][word] = of_columns[r][word] = 0;
  if (t == 0) listed = 0;
  const auto tile = [&](int64_t from) {
    return Matrix<A>{ranked.rows + from * ranked.width, ranked.width, kTile, ranked.depth};
  };
  TileSums<A> c;
  clear(c);
  add_tile_product<true, true>(c, tile(first + row), tile(column), ranked.depth);
  for_neighbours(c, [&](int i, int j, A left, A right) {
    const int64_t self = first + row + i, other = column + j;
    const A own = ranked.square[self];
    const auto apart = [&](int side, A product) -> A {
      const A norms = own + ranked.square[other + side], square = norms - 2 * product;
      if (!(square * kNearShare >= norms) && self != other + side && self < n && other + side < n) {
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
    const T *x = ranked.embedding(first + row + i), *y = ranked.embedding(column + j);
    A sum = 0;
    for (int64_t k = lane_id() % kPairLanes; k < ranked.d; k += kPairLanes) {
      const A difference = static_cast<A>(x[k]) - static_cast<A>(y[k]);
      sum += difference * difference;
    }
    sum = group_sum(sum, kPairLanes);
    if (lane_id() % kPairLanes == 0) distance[(row + i) * ranked.padded + column + j] = static_cast<A>(sqrt(sum));
  }
  near.by_anchor[(row + r) * near.samples + column / kWordBits + word] = of_rows[r][word];
  near.by_sample[(column + r) * near.anchors + row / kWordBits + word] = of_columns[r][word];
}

// One block: the mean over all pairs, 0 where there are none.
template <typename A>
__global__ void __launch_bounds__(kThreads, 1) mean_kernel(const double* __restrict__ losses, int64_t count,
                                                           const int64_t* __restrict__ unmasked, A* __restrict__ out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += losses[i];
  sum = block_sum(sum);
  const double n = static_cast<double>(*unmasked);
  if (threadIdx.x == 0) *out = static_cast<A>(n > 1 ? sum / (n * (n - 1)) : 0);
}

// Grid [tiles of the width, tiles of samples]: sums ← or += Σ_other a · row_other, a block's 64 samples from row `own`
// on, and `others` of them from row `other` on. The factors a are those of anchors `own` (`OfAnchors`: [own, padded])
// or of anchors `other` ([others, padded]).
template <bool OfAnchors, typename A>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<A>)
    pull_kernel(const A* __restrict__ rows, int64_t width, const A* __restrict__ factors, int64_t padded, int64_t own,
                int64_t other, int64_t others, bool add, A* __restrict__ sums) {
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
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    near_kernel(const __grid_constant__ Ranked<T> ranked, const __grid_constant__ Near near, int64_t first,
                int64_t size, const double* __restrict__ factors, int64_t stride, acc_t<T>* __restrict__ sums) {
  using A = acc_t<T>;
  const int64_t n = *ranked.unmasked, warps = int64_t{gridDim.x} * kWarps;
  for (int64_t p = int64_t{blockIdx.x} * kWarps + warp_id(); p < n; p += warps) {
    const T* const own = ranked.embedding(p);
    // words: which of the samples from row `begin` on are near p; theirs are the factors at from + place · step.
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
              sums[p * ranked.width + c] -= factor * (static_cast<A>(own[c]) - static_cast<A>(other[c]));
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
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    scatter_kernel(const __grid_constant__ Ranked<T> ranked, const acc_t<T>* __restrict__ sums, T* __restrict__ grad) {
  using A = acc_t<T>;
  const int64_t n = *ranked.unmasked, warps = int64_t{gridDim.x} * kWarps;
  for (int64_t p = int64_t{blockIdx.x} * kWarps + warp_id(); p < ranked.count; p += warps) {
    T* to = grad + ranked.sample[p] * ranked.d;
    const A *row = ranked.rows + p * ranked.width, *sum = sums + p * ranked.width;
    for (int64_t c = lane_id(); c < ranked.d; c += kWarp)
      to[c] = static_cast<T>(p < n && n > 1 ? sum[ranked.depth] * row[c] - sum[c] : A(0));
  }
}

}  // namespace msacore::rank_n_contrast::cuda
