// One pass of a stable radix sort: positions of the keys ordered by 8 of their bits. No result depends on the order in
// which threads or blocks run.
#pragma once
#include "cuda/device.cuh"

namespace msacore::cuda::radix {
namespace {  // several families include this file

constexpr int kDigits = 256, kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRounds = 16;                // keys of one thread
constexpr int kTile = kThreads * kRounds;  // keys of one block
constexpr int kScanThreads = 1024, kScanItems = 4;

// The keys at `position`, or at 0 … count - 1 where it is null: keys stay in place, positions move.
struct Keys {
  const int64_t* key;
  const int64_t* position;
  int64_t count, bound;  // keys outside [0, bound) count as the nearest key inside
  int shift;

  __device__ int64_t at(int64_t i) const { return position ? position[i] : i; }
  __device__ int digit(int64_t i) const {
    const int64_t k = key[at(i)];
    return static_cast<int>((k < 0 ? 0 : k >= bound ? bound - 1 : k) >> shift & (kDigits - 1));
  }
};

// Block b counts the digits of its tile: counts [256, blocks].
__global__ void __launch_bounds__(kThreads) count_kernel(Keys keys, int64_t* __restrict__ counts) {
  MSACORE_SHARED(count, int[kDigits]);
  count[threadIdx.x] = 0;
  __syncthreads();
  for (int r = 0; r < kRounds; ++r) {
    const int64_t i = int64_t{blockIdx.x} * kTile + r * kThreads + threadIdx.x;
    if (i < keys.count) atomicAdd(&count[keys.digit(i)], 1);
  }
  __syncthreads();
  counts[int64_t{threadIdx.x} * gridDim.x + blockIdx.x] = count[threadIdx.x];
}

// One block replaces each of `values` [count] by the sum of the values before it.
__global__ void __launch_bounds__(kScanThreads) exclusive_scan_kernel(int64_t* __restrict__ values, int64_t count) {
  int64_t before = 0;
  for (int64_t start = 0; start < count; start += kScanThreads * kScanItems) {
    const int64_t first = start + threadIdx.x * kScanItems;
    int64_t value[kScanItems], sum = 0, total = 0;
#pragma unroll
    for (int j = 0; j < kScanItems; ++j) {
      value[j] = first + j < count ? values[first + j] : 0;
      sum += value[j];
    }
    int64_t running = before + block_exclusive_scan(sum, total);
#pragma unroll
    for (int j = 0; j < kScanItems; ++j) {
      if (first + j < count) values[first + j] = running;
      running += value[j];
    }
    before += total;
  }
}

// Block b moves its tile; `starts` [256, blocks] holds where the keys of each digit and tile begin. A warp owns 512
// neighbouring keys and takes 32 at a time, so equal digits keep their order.
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(Keys keys, const int64_t* __restrict__ starts, int64_t* __restrict__ out) {
  MSACORE_SHARED(count, int[kWarps][kDigits]);
  const int lane = lane_id(), warp = warp_id();
  const int64_t first = int64_t{blockIdx.x} * kTile + warp * kRounds * kWarp + lane;
  for (int d = lane; d < kDigits; d += kWarp) count[warp][d] = 0;
  __syncwarp();
  int digit[kRounds], rank[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int64_t i = first + r * kWarp;
    digit[r] = i < keys.count ? keys.digit(i) : kDigits;
    const unsigned same = __match_any_sync(kAllLanes, digit[r]);
    const int before = __popc(same & ((1u << lane) - 1));
    const int seen = digit[r] < kDigits ? count[warp][digit[r]] : 0;
    rank[r] = seen + before;
    __syncwarp();
    if (before == 0 && digit[r] < kDigits) count[warp][digit[r]] = seen + __popc(same);
    __syncwarp();
  }
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kWarps; ++w) {
    const int own = count[w][threadIdx.x];
    count[w][threadIdx.x] = sum;
    sum += own;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int64_t i = first + r * kWarp;
    if (i < keys.count) {
      out[starts[int64_t{digit[r]} * gridDim.x + blockIdx.x] + count[warp][digit[r]] + rank[r]] = keys.at(i);
    }
  }
}

}  // namespace
}  // namespace msacore::cuda::radix
