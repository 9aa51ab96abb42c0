// What the launch code of every operator family (`<op>_cuda.cu`) builds on: registration, device guard, current stream,
// launch. A host build (tests/cuda_on_host) registers the same functions for CPU tensors in a library of its own.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/check.h"
#include "core/dtype.h"
#include "cuda/launch.cuh"

#ifdef __CUDACC__
#include <torch/csrc/stable/accelerator.h>
#define MSACORE_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(msacore, CUDA, m)
#else
#define MSACORE_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(msacore_host, CPU, m)
#endif

namespace msacore::cuda {

// Makes the tensor's device current while this object lives, and holds the stream to launch on.
struct OnDeviceOf {
#ifdef __CUDACC__
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDeviceOf(const Tensor& t) : guard(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
#else
  cudaStream_t stream = nullptr;

  explicit OnDeviceOf(const Tensor&) {}
#endif
};

}  // namespace msacore::cuda
