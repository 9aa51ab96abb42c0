// Rank-N-Contrast on CUDA. The samples are put in order of their targets once. Seen from an anchor, the label gap then
// falls from both ends towards it, so the others with a gap of at least g are a prefix and a suffix: a sum over them is
// read off two scans from outside in, at places found by bisection. The gradient takes two more from inside out. Sums
// of exponentials are kept in float64 with their largest exponent apart, so that no range of similarities is too wide.
//
// Distances and the products with the gradient are made of differences, not expanded squares: near pairs stay exact.
#pragma once
#include <limits>

#include "common/device.cuh"
#include "common/rows.cuh"

namespace msacore::rank_n_contrast {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTile = 64, kDepth = 16;  // of a block's tile of pairs, and of what it stages at once
constexpr int kPerThread = 4;           // rows and columns of the tile that a thread owns
constexpr int kScanItems = 4;           // of a thread

// The samples by rising target.
template <typename A, typename Target>
struct Ranked {
  int64_t count, padded;  // all samples, and that in whole tiles
  int64_t d, width;       // of an embedding, and that padded with zeros
  int64_t* sample;        // [count]: unmasked ones in order, targets that are no numbers last; then the masked
  acc_t<Target>* target;  // [count]
  A* rows;                // [padded, width]: embeddings, zeros from `unmasked` on
  int64_t* unmasked;      // how many
};

// Blocks of 256 samples count those before each, then move their embeddings.
template <typename T, typename Target>
__global__ void __launch_bounds__(kThreads, 4)
    rank_kernel(const T* __restrict__ embeddings, const Target* __restrict__ targets, const bool* __restrict__ mask,
                const __grid_constant__ Ranked<acc_t<T>, Target> ranked) {
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
      ranked.target[before] = own;
    }
    if (i == 0) *ranked.unmasked = unmasked;
    __syncthreads();
    for (int r = warp_id(); r < kThreads && first + r < ranked.padded; r += kWarps) {
      A* to = ranked.rows + place[r] * ranked.width;
      const T* from = embeddings + (first + r) * ranked.d;
      for (int64_t c = lane_id(); c < ranked.width; c += kWarp)
        to[c] = kind[r] != kMasked && c < ranked.d ? static_cast<A>(from[c]) : A(0);
    }
  }
}

template <typename A>
constexpr int kTileBlocks = sizeof(A) == 8 ? 2 : 4;  // of a multiprocessor: more would spill registers

template <typename A>
using Staged = A[kDepth][kTile + kPerThread];  // padded, so that the threads of a warp hit different banks

// A thread's rows and columns within the tile.
__device__ __forceinline__ int tile_row() { return thread_in_block() / (kTile / kPerThread) * kPerThread; }
__device__ __forceinline__ int tile_column() { return thread_in_block() % (kTile / kPerThread) * kPerThread; }

// to[k][r] ← from[r · stride + k]
template <typename A>
__device__ __forceinline__ void stage_transposed(Staged<A>& to, const A* __restrict__ from, int64_t stride) {
  const int r = thread_in_block() / (kDepth / kPerThread), k = thread_in_block() % (kDepth / kPerThread) * kPerThread;
  const auto values = load<kPerThread>(from + r * stride + k);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) to[k + i][r] = values.at[i];
}

// to[k][c] ← from[k · stride + c], zeros from `valid` on
template <typename A>
__device__ __forceinline__ void stage(Staged<A>& to, const A* __restrict__ from, int64_t stride, int64_t valid) {
  const int k = thread_in_block() / (kTile / kPerThread), c = tile_column();
  Vector<A, kPerThread> values{};
  if (c < valid) values = load<kPerThread>(from + k * stride + c);
  store(&to[k][c], values);
}

// Grid [column tiles, row tiles of the strip that begins at `first`]: distances [strip, padded].
template <typename A>
__global__ void __launch_bounds__(kThreads, kTileBlocks<A>)
    distance_kernel(const A* __restrict__ rows, int64_t width, int64_t first, int64_t padded,
                    A* __restrict__ distance) {
  MSACORE_SHARED(left, Staged<A>);
  MSACORE_SHARED(right, Staged<A>);
  const int64_t row = int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  A sum[kPerThread][kPerThread] = {};
  for (int64_t k = 0; k < width; k += kDepth) {
    stage_transposed(left, rows + (first + row) * width + k, width);
    stage_transposed(right, rows + column * width + k, width);
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      const auto x = load<kPerThread>(&left[depth][tile_row()]), y = load<kPerThread>(&right[depth][tile_column()]);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) {
          const A difference = x.at[i] - y.at[j];
          sum[i][j] += difference * difference;
        }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    Vector<A, kPerThread> values;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) values.at[j] = sqrt(sum[i][j]);
    store(distance + (row + tile_row() + i) * padded + column + tile_column(), values);
  }
}

constexpr double kNothing = -std::numeric_limits<double>::infinity();
constexpr double kNoNumber = std::numeric_limits<double>::quiet_NaN();

// sum · exp(top)
struct LogSum {
  double top, sum;

  __device__ double logarithm() const { return sum > 0 || sum != sum ? top + log(sum) : kNothing; }
};

__device__ __forceinline__ LogSum merge(const LogSum& a, const LogSum& b) {
  if (b.top == kNothing) return a;
  if (a.top == kNothing) return b;
  const double rise = b.top - a.top;
  if (rise > 0) return {b.top, a.sum * exp(-rise) + b.sum};
  return {a.top, a.sum + b.sum * exp(rise)};
}

__device__ __forceinline__ double log_add(double a, double b) { return merge({a, 1}, {b, 1}).logarithm(); }

// put(r, log Σ_{k ≤ r} exp(value(k))) for r < count; called by a block.
template <typename Value, typename Put>
__device__ __forceinline__ void scan_logarithms(int64_t count, Value value, Put put) {
  MSACORE_SHARED(partial, LogSum[kWarps]);
  LogSum before{kNothing, 0};
  for (int64_t start = 0; start < count; start += kThreads * kScanItems) {
    const int64_t first = start + threadIdx.x * kScanItems;
    double values[kScanItems];
    LogSum inclusive{kNothing, 0};
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      values[k] = first + k < count ? value(first + k) : kNothing;
      inclusive = merge(inclusive, {values[k], 1});
    }
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const LogSum other{__shfl_up_sync(kAllLanes, inclusive.top, step),
                         __shfl_up_sync(kAllLanes, inclusive.sum, step)};
      if (lane_id() >= step) inclusive = merge(other, inclusive);
    }
    LogSum running{__shfl_up_sync(kAllLanes, inclusive.top, 1), __shfl_up_sync(kAllLanes, inclusive.sum, 1)};
    if (lane_id() == 0) running = {kNothing, 0};
    __syncthreads();  // the readers of an earlier round are done
    if (lane_id() == kWarp - 1) partial[warp_id()] = inclusive;
    __syncthreads();
    LogSum of_warps = before;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp_id()) running = merge(of_warps, running);
      of_warps = merge(of_warps, partial[w]);
    }
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      running = merge(running, {values[k], 1});
      if (first + k < count) put(first + k, running.logarithm());
    }
    before = of_warps;
  }
}

// The first place in begin … end where `is` holds; it holds from there on.
template <typename Is>
__device__ __forceinline__ int64_t first_place(int64_t begin, int64_t end, Is is) {
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (is(middle)) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// An anchor per block, of the strip that begins at `first`; scratch [2, padded] for each. Writes its loss and, with
// `Backward`, replaces its distances by the factors a_j with which e_self - e_j enters the gradient.
template <bool Backward, typename A, typename Target>
__global__ void __launch_bounds__(kThreads, 2)
    anchor_kernel(const __grid_constant__ Ranked<A, Target> ranked, int64_t first, double inverse_temperature,
                  const A* __restrict__ grad_out, A* __restrict__ distances, double* __restrict__ scratch,
                  double* __restrict__ losses) {
  using Y = acc_t<Target>;
  const int64_t self = first + blockIdx.x, n = *ranked.unmasked, padded = ranked.padded;
  A* const distance = distances + int64_t{blockIdx.x} * padded;
  double* const scan = scratch + int64_t{blockIdx.x} * 2 * padded;
  double* const denominator = scan + padded;
  const auto similarity = [&](int64_t j) { return -static_cast<double>(distance[j]) * inverse_temperature; };
  const bool any = self < n && n > 1;
  const Y own = any ? ranked.target[self] : Y(0);
  const auto gap = [&](int64_t j) {
    return fabs(static_cast<double>(static_cast<Y>(static_cast<Target>(own - ranked.target[j]))));
  };
  bool bad = false;
  for (int64_t j = threadIdx.x; any && j < n; j += kThreads) bad = bad || gap(j) != gap(j);
  bad = __syncthreads_or(bad);
  double loss = bad ? kNoNumber : 0;
  if (any && !bad) {
    const auto store_scan = [&](int64_t j, double value) { scan[j] = value; };
    scan_logarithms(self, similarity, store_scan);
    scan_logarithms(
        n - 1 - self, [&](int64_t r) { return similarity(n - 1 - r); },
        [&](int64_t r, double value) { store_scan(n - 1 - r, value); });
    __syncthreads();
    for (int64_t j = threadIdx.x; j < n; j += kThreads) {
      if (j == self) continue;
      const double wanted = gap(j);
      const int64_t left = first_place(0, self, [&](int64_t k) { return gap(k) < wanted; });
      const int64_t right = first_place(self + 1, n, [&](int64_t k) { return gap(k) >= wanted; });
      const double value = log_add(left > 0 ? scan[left - 1] : kNothing, right < n ? scan[right] : kNothing);
      loss += value - similarity(j);
      if (Backward) denominator[j] = value;
    }
    if (Backward) {
      __syncthreads();
      scan_logarithms(
          self, [&](int64_t r) { return -denominator[self - 1 - r]; },
          [&](int64_t r, double value) { store_scan(self - 1 - r, value); });
      scan_logarithms(
          n - 1 - self, [&](int64_t r) { return -denominator[self + 1 + r]; },
          [&](int64_t r, double value) { store_scan(self + 1 + r, value); });
      __syncthreads();
    }
  }
  if (Backward) {
    const double pairs = static_cast<double>(n) * static_cast<double>(n - 1);
    const double scale = any ? -static_cast<double>(*grad_out) / pairs * inverse_temperature : 0;
    for (int64_t j = threadIdx.x; j < padded; j += kThreads) {
      double factor = 0;
      if (j < n && bad) {
        factor = kNoNumber;
      } else if (j < n && any && j != self && distance[j] != A(0)) {
        const double wanted = gap(j);
        const int64_t left = first_place(0, self, [&](int64_t k) { return gap(k) <= wanted; });
        const int64_t right = first_place(self + 1, n, [&](int64_t k) { return gap(k) > wanted; }) - 1;
        const double inverse = log_add(left < self ? scan[left] : kNothing, right > self ? scan[right] : kNothing);
        factor = scale * (exp(similarity(j) + inverse) - 1) / static_cast<double>(distance[j]);
      }
      distance[j] = static_cast<A>(factor);
    }
  } else {
    loss = block_sum(loss);
    if (threadIdx.x == 0) losses[self] = loss;
  }
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

// Grid [tiles of the width, tiles of samples]: gradient ← or += Σ_other a (e_own - e_other), a block's 64 samples from
// row `own` on, and `others` of them from row `other` on. The factors a are those of anchors `own` (`OfAnchors`:
// [own, padded]) or of anchors `other` ([others, padded]).
template <bool OfAnchors, typename A>
__global__ void __launch_bounds__(kThreads, kTileBlocks<A>)
    pull_kernel(const A* __restrict__ rows, int64_t width, const A* __restrict__ factors, int64_t padded, int64_t own,
                int64_t other, int64_t others, bool add, A* __restrict__ gradient) {
  MSACORE_SHARED(factor, Staged<A>);
  MSACORE_SHARED(values, Staged<A>);
  const int64_t tile = int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  const bool inside = column + tile_column() < width;
  Vector<A, kPerThread> own_values[kPerThread], sum[kPerThread];
  A* const to = gradient + (own + tile + tile_row()) * width + column + tile_column();
  const A* const from = rows + (own + tile + tile_row()) * width + column + tile_column();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    own_values[i] = sum[i] = {};
    if (inside) own_values[i] = load<kPerThread>(from + i * width);
    if (inside && add) sum[i] = load<kPerThread>(to + i * width);
  }
  for (int64_t k = 0; k < others; k += kDepth) {
    if (OfAnchors) {
      stage_transposed(factor, factors + tile * padded + k, padded);
    } else {
      stage(factor, factors + k * padded + tile, padded, kTile);
    }
    stage(values, rows + (other + k) * width + column, width, width - column);
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      const auto a = load<kPerThread>(&factor[depth][tile_row()]);
      const auto x = load<kPerThread>(&values[depth][tile_column()]);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) sum[i].at[j] += a.at[i] * (own_values[i].at[j] - x.at[j]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i)
    if (inside) store(to + i * width, sum[i]);
}

// grad [count, d] ← rows of `gradient`, a warp each; zeros for masked samples and where there are no pairs.
template <typename T, typename Target>
__global__ void __launch_bounds__(kThreads, 4)
    scatter_kernel(const __grid_constant__ Ranked<acc_t<T>, Target> ranked, const acc_t<T>* __restrict__ gradient,
                   T* __restrict__ grad) {
  const int64_t n = *ranked.unmasked, warps = int64_t{gridDim.x} * kWarps;
  for (int64_t p = int64_t{blockIdx.x} * kWarps + warp_id(); p < ranked.count; p += warps) {
    T* to = grad + ranked.sample[p] * ranked.d;
    for (int64_t c = lane_id(); c < ranked.d; c += kWarp)
      to[c] = static_cast<T>(p < n && n > 1 ? gradient[p * ranked.width + c] : acc_t<T>(0));
  }
}

}  // namespace msacore::rank_n_contrast
