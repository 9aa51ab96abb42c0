// The one place that launches kernels, and what a launch needs to know about the GPU.
#pragma once
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>

#include "core/round.h"
#include "cuda/device.cuh"

namespace msacore::cuda {

#ifdef __CUDACC__

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Maximum dynamic shared memory of a block, in bytes.
inline size_t shared_limit() { return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Checks the error that a launch returned, not CUDA's last error, which may be an earlier error of other code. After a
// failed launch the last error is cleared, so that the failure is reported here and not by the caller's next CUDA call.
inline void check_launch(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    const std::string arch = std::to_string(device_attribute(cudaDevAttrComputeCapabilityMajor)) + "." +
                             std::to_string(device_attribute(cudaDevAttrComputeCapabilityMinor));
    STD_TORCH_CHECK(false, "msacore: this build has no code for a GPU of compute capability ", arch,
                    "; build again with TORCH_CUDA_ARCH_LIST=", arch);
  }
  STD_CUDA_CHECK(error);
}

#else

inline size_t shared_limit() { return cuda_on_host::kSharedLimit; }
inline int multiprocessors() { return cuda_on_host::kMultiprocessors; }

#endif

#ifndef MSACORE_SMALL_SIZES
constexpr int64_t kMaxBlocks = 1 << 16;
#else
constexpr int64_t kMaxBlocks = 7;  // few, so that small inputs already make a thread own several elements
#endif

// Zeroes memory on the stream with a memset, not a kernel.
inline void clear_memory(void* memory, size_t bytes, cudaStream_t stream) {
#ifdef __CUDACC__
  STD_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream));
#else
  (void)stream;
  std::memset(memory, 0, bytes);
#endif
}

// A limit between two ways of computing the same result. An environment variable may set it, so that both ways can be
// measured.
inline int64_t limit_from(const char* variable, int64_t otherwise) {
  const char* text = std::getenv(variable);
  if (!text || !*text) return otherwise;
  char* end = nullptr;
  const int64_t limit = std::strtoll(text, &end, 10);
  STD_TORCH_CHECK(!*end && limit >= 0, "msacore: ", variable, " must be a number of at least 0, got ", text);
  return limit;
}

// Grid for a grid-stride loop over `items` (grid_thread, grid_threads), in blocks of `threads`.
inline dim3 grid_for(int64_t items, int threads) {
  return dim3(static_cast<unsigned>(std::min(ceil_div(items, threads), kMaxBlocks)));
}

// Runs `kernel` on `stream`; an empty grid is not launched. Dynamic shared memory up to the GPU's limit is granted.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A... args) {
  static_assert((sizeof(P) + ... + 0) <= 4000, "kernel parameters beyond 4 KiB need a driver of CUDA 12.1 or newer");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const size_t threads = size_t{block.x} * block.y * block.z;
  STD_TORCH_CHECK(threads >= 1 && threads <= 1024 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535,
                  "msacore: cannot launch a grid of ", grid.x, " x ", grid.y, " x ", grid.z, " blocks of ", threads,
                  " threads");
  constexpr size_t kGrantedAlways = 48 * 1024;
  if (shared > kGrantedAlways) {
    STD_TORCH_CHECK(shared <= shared_limit(), "msacore: a kernel needs ", shared,
                    " bytes of shared memory per block, but this GPU has ", shared_limit());
  }
#ifdef __CUDACC__
  if (shared > kGrantedAlways) {
    check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  std::tuple<P...> parameters(static_cast<P>(args)...);
  std::apply(
      [&](P&... each) {
        void* pointers[] = {static_cast<void*>(&each)..., nullptr};  // never an empty array
        check_launch(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared, stream));
      },
      parameters);
#else
  (void)stream;
  cuda_on_host::launch(kernel, grid, block, shared, args...);
#endif
}

}  // namespace msacore::cuda
