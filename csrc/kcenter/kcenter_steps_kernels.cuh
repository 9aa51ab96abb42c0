// Scanning and ranking the pool, and the greedy steps among candidates, on the device.
#pragma once
#include "kcenter/kcenter.h"
#include "kcenter/kcenter_distance.cuh"

namespace msacore::kcenter::cuda {

constexpr int kMatrixRows = 16, kMatrixColumns = 32, kMatrixDepth = 32;
constexpr int kGreedyThreads = 1024;

// Checksums of rows, from their 32-bit words (16-bit words for 16-bit types), keyed by position. A warp owns a row.
// `largest` is the largest magnitude, in ordered bits, and `bad` the first row that is not finite; both start with the
// values of an empty pool.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    scan_rows_kernel(const T* __restrict__ pool, int64_t n, int64_t d, int64_t* __restrict__ checksum,
                     unsigned long long* __restrict__ largest, unsigned long long* __restrict__ bad) {
  using Word = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  constexpr int kWords = sizeof(T) / sizeof(Word);
  const auto key = [](int64_t word) {
    auto z = static_cast<unsigned long long>(word + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>(z ^ (z >> 31)) | 1u;
  };
  double most = 0;
  for (int64_t i = grid_thread() / kWarp; i < n; i += grid_threads() / kWarp) {
    const T* x = pool + i * d;
    const Word* words = reinterpret_cast<const Word*>(x);
    unsigned long long sum = 0;
    bool finite = true;
    for (int64_t j = lane_id(); j < d; j += kWarp) {
      for (int w = 0; w < kWords; ++w) {
        sum += static_cast<unsigned long long>(words[j * kWords + w]) * key(j * kWords + w);
      }
      const double size = fabs(static_cast<double>(x[j]));
      finite = finite && size <= 1.7976931348623157e308;
      most = size > most ? size : most;
    }
    sum = warp_sum(sum);
    const bool fine = __all_sync(kAllLanes, finite);
    if (lane_id() == 0) checksum[i] = static_cast<int64_t>(sum);
    if (lane_id() == 0 && !fine) atomicMin(bad, static_cast<unsigned long long>(i));
  }
  most = warp_max(most);
  if (lane_id() == 0) atomicMax(largest, ordered_bits(most));
}

// sums [⌈n / 4096⌉, d] of blocks of rows, along the same tree as on the CPU; a thread owns a column of a block
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    column_sums_kernel(const T* __restrict__ pool, int64_t n, int64_t d, double* __restrict__ sums) {
  constexpr int kLevels = 11;  // of the tree above four rows
  const int64_t begin = int64_t{blockIdx.x} * kScanBlock, end = begin + kScanBlock < n ? begin + kScanBlock : n;
  for (int64_t j = threadIdx.x; j < d; j += kThreads) {
    double level[kLevels];  // sums of finished subtrees, each waiting for the one to its right
    const auto value = [&](int64_t i) { return static_cast<double>(pool[i * d + j]); };
    int groups = 0;
    for (int64_t i = begin; i < end; i += 4, ++groups) {
      double sum = value(i);
      if (i + 1 < end) sum += value(i + 1);
      if (i + 3 < end) {
        sum += value(i + 2) + value(i + 3);
      } else if (i + 2 < end) {
        sum += value(i + 2);
      }
      int l = 0;
      for (; groups >> l & 1; ++l) sum = level[l] + sum;
      level[l] = sum;
    }
    double sum = 0;
    bool empty = true;
    for (int l = 0; l < kLevels; ++l) {
      if (!(groups >> l & 1)) continue;
      sum = empty ? level[l] : level[l] + sum;
      empty = false;
    }
    sums[blockIdx.x * d + j] = sum;
  }
}

// Sets what the scan starts from; where largest_out is not null, writes the largest magnitude at the end of the scan
// instead.
__global__ void scan_frame_kernel(int64_t n, unsigned long long* largest, unsigned long long* bad,
                                  double* __restrict__ largest_out) {
  if (largest_out) {
    *largest_out = from_ordered_bits(*largest);
  } else {
    *largest = ordered_bits(0);
    *bad = static_cast<unsigned long long>(n);
  }
}

// out [count, centres] = <pool[rows[i]] - shift, c>; eight lanes own a pair and sum it as distances are summed.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    products_kernel(const T* __restrict__ pool, const int64_t* __restrict__ rows, const double* __restrict__ shift,
                    const double* __restrict__ centers, int64_t samples, int64_t count, int64_t n, int64_t d,
                    double* __restrict__ out) {
  for (int64_t p = grid_thread() / kGroup; p < count * n; p += grid_threads() / kGroup) {
    const T* const x = pool + clamped(rows[p / n], samples) * d;
    const double* const c = centers + p % n * d;
    double sum = 0;
    for (int64_t j = lane_id() % kGroup; j < d; j += kGroup) {
      sum = fma(static_cast<double>(x[j]) - shift[j], c[j], sum);
    }
    sum = group_sum(sum, kGroup);
    if (lane_id() % kGroup == 0) out[p] = sum;
  }
}

// low, high [n]: the halves of a key that rises as scores fall; a NaN counts as -inf, -0 as 0.
__global__ void __launch_bounds__(kThreads, 4) rank_keys_kernel(const double* __restrict__ score, int64_t n,
                                                                int64_t* __restrict__ low, int64_t* __restrict__ high) {
  for (int64_t i = grid_thread(); i < n; i += grid_threads()) {
    const double value = score[i] == 0 ? 0.0 : score[i];
    const unsigned long long key = value == value ? ~ordered_bits(value) : ~ordered_bits(-INFINITY);
    low[i] = static_cast<int64_t>(key & 0xffffffffull);
    high[i] = static_cast<int64_t>(key >> 32);
  }
}

// Squared norms [m] of rows [m, d]; eight lanes own a row.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    norms_kernel(const T* __restrict__ x, int64_t m, int64_t d, double* __restrict__ out) {
  for (int64_t i = grid_thread() / kGroup; i < m; i += grid_threads() / kGroup) {
    double sum = 0;
    for (int64_t j = lane_id() % kGroup; j < d; j += kGroup) {
      sum = fma(static_cast<double>(x[i * d + j]), static_cast<double>(x[i * d + j]), sum);
    }
    sum = group_sum(sum, kGroup);
    if (lane_id() % kGroup == 0) out[i] = sum;
  }
}

// out [m, m], the distances among rows x [m, d] with squared norms [m]. A block owns 16 x 32 pairs, a thread two.
template <bool kCosine, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    distances_kernel(const T* __restrict__ x, const double* __restrict__ norms, int64_t m, int64_t d,
                     double* __restrict__ out) {
  MSACORE_SHARED(rows, double[kMatrixRows][kMatrixDepth + 1]);
  MSACORE_SHARED(columns, double[kMatrixColumns][kMatrixDepth + 1]);
  const int t = threadIdx.x, row = t / 16, column = t % 16;
  const int64_t first_row = int64_t{blockIdx.y} * kMatrixRows, first_column = int64_t{blockIdx.x} * kMatrixColumns;
  const auto value = [&](int64_t i, int64_t j) { return i < m && j < d ? static_cast<double>(x[i * d + j]) : 0.0; };
  PairSum<kCosine> left, right;
  for (int64_t k = 0; k < d; k += kMatrixDepth) {
    __syncthreads();
    for (int e = t; e < kMatrixColumns * kMatrixDepth; e += kThreads) {
      const int r = e / kMatrixDepth, c = e % kMatrixDepth;
      columns[r][c] = value(first_column + r, k + c);
      if (r < kMatrixRows) rows[r][c] = value(first_row + r, k + c);
    }
    __syncthreads();
    for (int s = 0; s < kMatrixDepth; s += kGroup) {
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const double a = rows[row][s + g];
        left.add(g, a, columns[column][s + g]);
        right.add(g, a, columns[column + 16][s + g]);
      }
    }
  }
  const int64_t i = first_row + row, j = first_column + column;
  const auto norm = [&](int64_t k) { return kCosine ? norms[k] : 0.0; };
  if (i < m && j < m) out[i * m + j] = left.distance(x + i * d, x + j * d, d, norm(i), norm(j));
  if (i < m && j + 16 < m) {
    out[i * m + j + 16] = right.distance(x + i * d, x + (j + 16) * d, d, norm(i), norm(j + 16));
  }
}

// A candidate in the order of picks: higher scores first, then smaller indices, then smaller positions.
struct Ranked {
  double score;
  int64_t index, position;  // position -1: no candidate

  __device__ bool precedes(const Ranked& other) const {
    return score > other.score || (score == other.score && index < other.index);
  }
  __device__ bool better_than(const Ranked& other) const {
    if (position < 0 || other.position < 0) return other.position < 0 && position >= 0;
    return precedes(other) || (score == other.score && index == other.index && position < other.position);
  }
  __device__ Ranked from_lane(int step) const {
    return {__shfl_xor_sync(kAllLanes, score, step), __shfl_xor_sync(kAllLanes, index, step),
            __shfl_xor_sync(kAllLanes, position, step)};
  }
};

// The best candidate of a block, for every thread.
__device__ __forceinline__ Ranked block_best(Ranked mine) {
  MSACORE_SHARED(partial, Ranked[kWarp]);
  const auto reduce = [&] {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const Ranked other = mine.from_lane(step);
      if (other.better_than(mine)) mine = other;
    }
  };
  reduce();
  __syncthreads();  // the readers of an earlier call are done
  if (lane_id() == 0) partial[warp_id()] = mine;
  __syncthreads();
  mine = partial[lane_id()];
  reduce();
  return mine;
}

// Candidates x [m, d] with squared norms [m] (cosine) and, where not null, the distances [m, m] among the candidates
// and the group [m] of each.
template <typename T>
struct Contest {
  const T* x;
  const double *norms, *distances, *weight;
  const int64_t *index, *group;
  int64_t m, d;

  template <bool kCosine>
  __device__ double distance(int64_t a, int64_t b) const {
    if (distances) return distances[a * m + b];
    PairSum<kCosine> sum;
    const auto value = [&](int64_t i, int64_t j) { return j < d ? static_cast<double>(x[i * d + j]) : 0.0; };
    for (int64_t j = 0; j < d; j += kGroup) {
#pragma unroll
      for (int g = 0; g < kGroup; ++g) sum.add(g, value(a, j + g), value(b, j + g));
    }
    return sum.distance(x + a * d, x + b * d, d, kCosine ? norms[a] : 0, kCosine ? norms[b] : 0);
  }
};

// One block picks up to `limit` candidates for as long as the best precedes the bound. picks, scores [limit]: positions
// and scores of the picks, then -1 and -inf. now [m]: the distances so far; NaN once a candidate is picked, falls
// behind the bound for good, or belongs to a group without room. left [groups]: the room that is left, initially
// `room`.
template <bool kCosine, typename T>
__global__ void __launch_bounds__(kGreedyThreads)
    greedy_kernel(Contest<T> among, const double* __restrict__ delta, const int64_t* __restrict__ room, int64_t groups,
                  const double* __restrict__ bound, const int64_t* __restrict__ bound_index, int64_t limit,
                  double* __restrict__ now, int64_t* left, int64_t* __restrict__ picks, double* __restrict__ scores) {
  for (int64_t g = threadIdx.x; g < groups; g += kGreedyThreads) left[g] = room[g];
  for (int64_t k = threadIdx.x; k < limit; k += kGreedyThreads) {
    picks[k] = -1;
    scores[k] = -INFINITY;
  }
  __syncthreads();
  const Ranked outside{bound[0], bound_index[0], 0};
  int64_t last = -1;
  for (int64_t made = 0; made < limit; ++made) {
    Ranked best{0, 0, -1};
    for (int64_t i = threadIdx.x; i < among.m; i += kGreedyThreads) {
      double own = last < 0 ? delta[i] : now[i];
      if (last >= 0 && own == own) {
        const double found = among.template distance<kCosine>(last, i);
        own = found < own ? found : own;
      }
      const Ranked candidate{among.weight[i] * own, among.index[i], i};
      const bool fits = !among.group || left[clamped(among.group[i], groups)] > 0;
      const bool open = i != last && fits && candidate.precedes(outside);
      now[i] = open ? own : NAN;
      if (open && candidate.better_than(best)) best = candidate;
    }
    best = block_best(best);
    if (best.position < 0) break;
    last = best.position;
    if (threadIdx.x == 0) {
      picks[made] = best.position;
      scores[made] = best.score;
      if (among.group) --left[clamped(among.group[last], groups)];
    }
    __syncthreads();
  }
}

}  // namespace msacore::kcenter::cuda
