// Everything a kernel may use. Under nvcc this is CUDA; under a host compiler it is tests/cuda_on_host. Tests define
// MSACORE_SMALL_SIZES, which makes pieces, strips and limits small, so that small inputs already reach every branch.
#pragma once
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_on_host.h"
#endif

#include "core/types.h"

namespace msacore::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// MSACORE_SHARED(tile, float[32][33]); declares a `__shared__` variable. On the host it holds NaN before a block
// starts.
template <typename T>
using identity_t = T;
#ifdef __CUDACC__
#define MSACORE_SHARED(name, ...) __shared__::msacore::cuda::identity_t<__VA_ARGS__> name
#else
#define MSACORE_SHARED(name, ...)                                                                            \
  static char name##_key;                                                                                    \
  auto& name = *static_cast<::msacore::cuda::identity_t<__VA_ARGS__>*>(                                      \
      cuda_on_host::machine().shared_variable(&name##_key, sizeof(::msacore::cuda::identity_t<__VA_ARGS__>), \
                                              alignof(::msacore::cuda::identity_t<__VA_ARGS__>)))
#endif

// The block's dynamic shared memory, 16-byte aligned, of the size that the launch asked for.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char msacore_dynamic_shared[];
  return reinterpret_cast<T*>(msacore_dynamic_shared);
#else
  return static_cast<T*>(cuda_on_host::machine().dynamic_shared());
#endif
}

__device__ __forceinline__ int thread_in_block() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
__device__ __forceinline__ int threads_in_block() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }
__device__ __forceinline__ int lane_id() { return thread_in_block() % kWarp; }
__device__ __forceinline__ int warp_id() { return thread_in_block() / kWarp; }

// for (int64_t i = grid_thread(); i < n; i += grid_threads()), in one-dimensional grids
__device__ __forceinline__ int64_t grid_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t grid_threads() { return int64_t{gridDim.x} * blockDim.x; }

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
// A NaN wins, as in torch.
struct Max {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};
struct Min {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b || a != a ? a : b;
  }
};

// Reductions along a fixed tree: every lane gets the same bits, in every run. `Lanes` neighbouring lanes reduce
// together.
template <int Lanes = kWarp, typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}
// Sum over `lanes` neighbouring lanes (a power of two), while other groups of the warp may be executing other code.
template <typename T>
__device__ __forceinline__ T group_sum(T value, int lanes) {
  const unsigned group = (lanes == kWarp ? kAllLanes : (1u << lanes) - 1) << (lane_id() / lanes * lanes);
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(group, value, step);
  return value;
}
template <int Lanes = kWarp, typename T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce<Lanes>(value, Sum{});
}
template <int Lanes = kWarp, typename T>
__device__ __forceinline__ T warp_max(T value) {
  return warp_reduce<Lanes>(value, Max{});
}

// Called by all threads of a block of whole warps; every thread gets the result.
template <typename T, typename Op>
__device__ __forceinline__ T block_reduce(T value, Op op, T identity) {
  MSACORE_SHARED(partial, T[kWarp]);
  value = warp_reduce(value, op);
  __syncthreads();  // the readers of an earlier call are done
  if (lane_id() == 0) partial[warp_id()] = value;
  __syncthreads();
  return warp_reduce(lane_id() < threads_in_block() / kWarp ? partial[lane_id()] : identity, op);
}
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  return block_reduce(value, Sum{}, T(0));
}

// Sum over this lane and the lanes before it.
template <typename T>
__device__ __forceinline__ T warp_inclusive_scan(T value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, step);
    if (lane_id() >= step) value += before;
  }
  return value;
}

// Sum over the threads before this one; `total` becomes the sum over the block. Called like block_reduce.
template <typename T>
__device__ __forceinline__ T block_exclusive_scan(T value, T& total) {
  MSACORE_SHARED(partial, T[kWarp]);
  const T inclusive = warp_inclusive_scan(value);
  __syncthreads();
  if (lane_id() == kWarp - 1) partial[warp_id()] = inclusive;
  __syncthreads();
  const T warps = warp_inclusive_scan(lane_id() < threads_in_block() / kWarp ? partial[lane_id()] : T(0));
  total = __shfl_sync(kAllLanes, warps, kWarp - 1);
  const T before = __shfl_sync(kAllLanes, warps, warp_id() == 0 ? 0 : warp_id() - 1);
  return (warp_id() == 0 ? T(0) : before) + inclusive - value;
}

// N neighbouring elements moved as one access; the address must be a multiple of their size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};
template <typename T>
constexpr int kPer16 = 16 / sizeof(T);
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}
template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& values) {
  *reinterpret_cast<Vector<T, N>*>(to) = values;
}

}  // namespace msacore::cuda

#include "cuda/async.cuh"
#include "cuda/mma.cuh"
