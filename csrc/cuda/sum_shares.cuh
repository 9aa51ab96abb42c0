// Launches of sums to which several blocks contribute.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/sum_shares_kernels.cuh"

namespace msacore::cuda {

// Sums `share_count` shares, which lie `stride` apart, into `out` [count].
template <typename A, typename T>
void sum_shares(const A* shares, int64_t share_count, int64_t stride, T* out, int64_t count, cudaStream_t stream) {
  const bool many = share_count > 64;
  launch(many ? sum_many_shares_kernel<A, T> : sum_shares_kernel<A, T>,
         many ? grid_for(count * kSumThreads, kSumThreads) : grid_for(count, kSumThreads), dim3(kSumThreads), 0, stream,
         shares, out, share_count, stride, count);
}

}  // namespace msacore::cuda
