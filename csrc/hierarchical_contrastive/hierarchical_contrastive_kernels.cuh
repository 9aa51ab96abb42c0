// What the hierarchical contrastive loss on CUDA adds to the kernels of all contrastive losses: which samples take part
// where, and the tiers.
#pragma once
#include "contrastive/cuda/gradient_kernels.cuh"
#include "core/optional.h"

namespace msacore::hierarchical_contrastive::cuda {
using namespace contrastive::cuda;

constexpr int kTermsAtOnce = 11, kSidesAtOnce = 16;  // what the 4 KiB of a kernel's parameters hold
constexpr int kFinishThreads = 1024;                 // the one block that adds everything up

// The samples of a side or of a term: those that have all of `modalities` (bits), and at least `least` modalities
// altogether.
struct Need {
  uint64_t modalities;
  int64_t least;
};

struct Availability {
  const bool* available;  // [n, modalities] or null: all are
  int64_t modalities;

  __device__ bool meets(const Need& need, int64_t i) const {
    uint64_t missing = 0;
    int64_t count = modalities;
    for (int64_t m = 0; available && m < modalities; ++m) {
      if (available[i * modalities + m]) continue;
      missing |= uint64_t(1) << m;
      --count;
    }
    return (missing & need.modalities) == 0 && count >= need.least;
  }
};

// The similarities [terms, rows, rows] that the forward pass keeps for the backward pass; null where it keeps none.
template <typename A>
struct KeptSimilarities {
  A* at;
  int rows;

  __host__ __device__ A* of_term(int64_t term) const { return at ? at + term * rows * rows : nullptr; }
};

template <typename A>
KeptSimilarities<A> kept_similarities(const Tensor& kept) {
  A* const at = kept_data<A>(kept);
  return {at, at ? static_cast<int>(kept.size(1)) : 0};
}

// Sides to prepare and terms to count.
template <typename T>
struct Preparation {
  Availability available;
  Side<T> sides[kSidesAtOnce];
  Need side_needs[kSidesAtOnce];
  int side_count;
  int64_t n;
  bool normalize;
  Need term_needs[kTermsAtOnce];
  const int64_t* labels[kTermsAtOnce];  // [n] or null
  const acc_t<T>* stats;                // [terms, 2, 4, n], backward; else null
  int64_t* counts;                      // [terms, 2, 2], see Side
};

// Grid [blocks, sides + terms].
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4) prepare_kernel(const __grid_constant__ Preparation<T> p) {
  const int y = static_cast<int>(blockIdx.y);
  if (y < p.side_count) {
    const Side<T>& side = p.sides[y];
    prepare_rows(
        side, p.n, p.normalize, 0, [&](int64_t i) { return side.x + i * side.d; },
        [&](int64_t i) { return p.available.meets(p.side_needs[y], i); });
  } else if (blockIdx.x == 0) {
    const int64_t term = y - p.side_count;
    const int64_t* labels = p.labels[term];
    for (int64_t direction = 2 * term; direction < 2 * term + 2; ++direction)
      count_rows(p.n, p.n, p.stats ? p.stats + direction * kAnchorStats * p.n : nullptr, p.counts + 2 * direction,
                 [&](int64_t i) { return (!labels || labels[i] >= 0) && p.available.meets(p.term_needs[term], i); });
  }
}

// Tier k ends before term end[k].
struct Tiers {
  static constexpr int kCount = 3;
  int64_t end[kCount];
  double weight[kCount];
};

// Partial sum over a subset of anchors.
struct LossSum {
  double loss;
  int anchors;
};

// Tiers [3], each the sum over its terms of the means over both directions, and their weighted sum. Called by a block;
// a warp asks share_of(direction) for what each lane adds to the direction's sum.
template <typename A, typename ShareOf>
__device__ __forceinline__ void finish_tiers(const Tiers& tiers, A* loss, A* out, ShareOf share_of) {
  const int warps = threads_in_block() / kWarp;
  MSACORE_SHARED(sums, double[Tiers::kCount][kWarp]);
  for (int k = 0; k < Tiers::kCount; ++k) {
    double sum = 0;
    const int64_t begin = k > 0 ? 2 * tiers.end[k - 1] : 0;
    for (int64_t direction = begin + warp_id(); direction < 2 * tiers.end[k]; direction += warps) {
      const LossSum share = share_of(direction);
      const double total = warp_sum(share.loss);
      const int anchors = warp_sum(share.anchors);
      sum += total / (2.0 * (anchors > 0 ? anchors : 1));
    }
    if (lane_id() == 0) sums[k][warp_id()] = sum;
  }
  __syncthreads();
  if (thread_in_block() == 0) {
    double weighted = 0;
    for (int k = 0; k < Tiers::kCount; ++k) {
      double sum = 0;
      for (int w = 0; w < warps; ++w) sum += sums[k][w];
      out[k] = static_cast<A>(sum);
      weighted += tiers.weight[k] * static_cast<double>(out[k]);
    }
    *loss = static_cast<A>(weighted);
  }
}

// One block: loss and tiers from losses [terms, 2, n] and stats [terms, 2, 4, n].
template <typename A>
__global__ void __launch_bounds__(kFinishThreads, 1)
    tiers_kernel(const double* __restrict__ losses, const A* __restrict__ stats, int64_t n,
                 const __grid_constant__ Tiers tiers, A* __restrict__ loss, A* __restrict__ out) {
  finish_tiers(tiers, loss, out, [&](int64_t direction) {
    LossSum share{0, 0};
    for (int64_t i = lane_id(); i < n; i += kWarp) {
      share.loss += losses[direction * n + i];
      share.anchors += stats[(direction * kAnchorStats + kTotal) * n + i] != A(0);
    }
    return share;
  });
}

// A block per term: sums[t] ← Σ slopes[t · count …], of a learned temperature.
__global__ void __launch_bounds__(kSumThreads, 1)
    slope_kernel(const double* __restrict__ slopes, int64_t count, double* __restrict__ sums) {
  const double sum = sum_of(slopes + blockIdx.x * count, count);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

}  // namespace msacore::hierarchical_contrastive::cuda
