// Copies from global to shared memory that bypass registers (cp.async): issue, commit a group, wait, then a barrier.
#pragma once
#include "cuda/device.cuh"

namespace msacore::cuda {

// Copies 16 bytes, both addresses 16-byte aligned. With `valid` false nothing is read and zeros are written.
__device__ __forceinline__ void async_copy16(void* shared, const void* global, bool valid = true) {
#ifdef __CUDACC__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
#else
  cuda_on_host::async_copy(shared, global, 16, valid);
#endif
}

// The same for 4 bytes, for rows whose width is not a multiple of 16 bytes.
__device__ __forceinline__ void async_copy4(void* shared, const void* global, bool valid = true) {
#ifdef __CUDACC__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(valid ? 4 : 0) : "memory");
#else
  cuda_on_host::async_copy(shared, global, 4, valid);
#endif
}

// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  cuda_on_host::async_commit();
#endif
}

// Waits until at most `Pending` of this thread's latest groups are unfinished. Other threads see the data after a
// barrier.
template <int Pending = 0>
__device__ __forceinline__ void async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#else
  cuda_on_host::async_wait(Pending);
#endif
}

}  // namespace msacore::cuda
