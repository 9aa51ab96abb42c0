// Scratch memory of an operator.
#pragma once
#include <vector>

#include "core/allocate.h"
#include "core/round.h"
#include "cuda/registration.cuh"

namespace msacore::cuda {

// Arrays in one allocation, because an allocation costs the host as much as a small kernel costs the GPU.
// `request(scratch)` takes every array; it is called twice, the first time to learn the size. In a host build every
// array is a tensor of its own, so that AddressSanitizer sees its bounds.
class Scratch {
 public:
  template <typename Request>
  Scratch(const Tensor& like, Request&& request) : like_(like) {
#ifdef __CUDACC__
    request(*this);
    memory_.push_back(empty_tensor(like_, {used_}, ScalarType::Byte));
    begin_ = static_cast<char*>(memory_.front().mutable_data_ptr());
    used_ = 0;
#endif
    request(*this);
  }

  template <typename T>
  void take(T*& array, int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
#ifdef __CUDACC__
    constexpr int64_t kAlignment = 256;
    array = begin_ ? reinterpret_cast<T*>(begin_ + used_) : nullptr;
    used_ += round_up(bytes, kAlignment);
#else
    memory_.push_back(empty_tensor(like_, {bytes}, ScalarType::Byte));
    array = static_cast<T*>(memory_.back().mutable_data_ptr());
#endif
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> memory_;
#ifdef __CUDACC__
  char* begin_ = nullptr;
  int64_t used_ = 0;
#endif
};

}  // namespace msacore::cuda
