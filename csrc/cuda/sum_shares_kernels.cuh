// Second pass of sums to which several blocks contribute: their shares are added in a fixed order, without atomics.
#pragma once
#include "cuda/device.cuh"

namespace msacore::cuda {

constexpr int kSumThreads = 256;

// out[i] = Σ_n shares[n · stride + i], in double, by a thread per result; where there are many shares, by a block per
// result.
template <typename A, typename T>
__global__ void __launch_bounds__(kSumThreads, 4)
    sum_shares_kernel(const A* __restrict__ shares, T* __restrict__ out, int64_t share_count, int64_t stride,
                      int64_t count) {
  for (int64_t i = grid_thread(); i < count; i += grid_threads()) {
    double sum = 0;
    for (int64_t n = 0; n < share_count; ++n) sum += static_cast<double>(shares[n * stride + i]);
    out[i] = static_cast<T>(sum);
  }
}

template <typename A, typename T>
__global__ void __launch_bounds__(kSumThreads, 4)
    sum_many_shares_kernel(const A* __restrict__ shares, T* __restrict__ out, int64_t share_count, int64_t stride,
                           int64_t count) {
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    double sum = 0;
    for (int64_t n = thread_in_block(); n < share_count; n += kSumThreads) {
      sum += static_cast<double>(shares[n * stride + i]);
    }
    sum = block_sum(sum);
    if (thread_in_block() == 0) out[i] = static_cast<T>(sum);
  }
}

}  // namespace msacore::cuda
