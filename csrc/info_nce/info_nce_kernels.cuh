// What InfoNCE on CUDA adds to the kernels of all contrastive losses: masks, reductions, a learned temperature.
#pragma once
#include "contrastive/cuda/kernels.cuh"

namespace msacore::info_nce::cuda {
using namespace contrastive::cuda;

constexpr int kFinishThreads = 1024;  // the one block that adds everything up

// Anchors and candidates; the negatives, which all anchors share, follow the candidates.
template <typename T>
struct Roles {
  Side<T> side[2];
  const bool* mask[2];  // [n] or null
  const T* negatives;   // [negative_count, d]
  const bool* negative_mask;
  int64_t negative_count;
  bool normalize;
  const int64_t* used[2];  // how many rows of the whole batch take part, where these are a part of it; else null
};

// The last block of a role counts; the others prepare its rows. Grid [blocks, 2].
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4) prepare_kernel(const __grid_constant__ Roles<T> roles) {
  const Side<T>& side = roles.side[blockIdx.y];
  const bool* mask = roles.mask[blockIdx.y];
  const int64_t count = side.n + (blockIdx.y == 1 ? roles.negative_count : 0);
  const auto row_of = [&](int64_t i) {
    return i < side.n ? side.x + i * side.d : roles.negatives + (i - side.n) * side.d;
  };
  const auto takes_part = [&](int64_t i) {
    if (i >= side.n) return !roles.negative_mask || roles.negative_mask[i - side.n];
    return (!mask || mask[i]) && (!side.labels || side.labels[i] >= 0);
  };
  if (blockIdx.x == gridDim.x - 1) {
    count_rows(side.n, count, side.stats, side.counts, takes_part);
    if (roles.used[blockIdx.y] && threadIdx.x == 0) side.counts[0] = *roles.used[blockIdx.y];
  } else {
    prepare_rows(side, count, roles.normalize, 1, row_of, takes_part);
  }
}

// One block: the loss, from the losses of the rows and of the columns (n = 0 where columns are not anchors).
template <typename A>
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish_kernel(const double* __restrict__ row_losses, const A* __restrict__ row_stats, int64_t n,
                  const double* __restrict__ column_losses, const A* __restrict__ column_stats, int64_t m,
                  bool two_sided, bool mean, bool per_anchor, A* __restrict__ out) {
  if (per_anchor) {
    for (int64_t i = threadIdx.x; i < n; i += kFinishThreads)
      out[i] = static_cast<A>(two_sided ? (row_losses[i] + column_losses[i]) / 2 : row_losses[i]);
  } else {
    const auto sum = [&](const double* losses, const A* stats, int64_t count) {
      double total = 0;
      int kept = 0;
      for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) {
        total += losses[i];
        kept += stats[contrastive::cuda::kTotal * count + i] != A(0);
      }
      total = block_sum(total);
      kept = block_sum(kept);
      return mean && kept > 0 ? total / kept : total;
    };
    const double rows = sum(row_losses, row_stats, n);
    const double columns = sum(column_losses, column_stats, m);
    if (threadIdx.x == 0) *out = static_cast<A>(two_sided ? (rows + columns) / 2 : rows);
  }
}

}  // namespace msacore::info_nce::cuda
