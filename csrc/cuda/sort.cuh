// Stable sort on the device with no host synchronisation: the number of passes follows from the bound on the keys.
#pragma once
#include <utility>

#include "core/allocate.h"
#include "core/round.h"
#include "cuda/registration.cuh"
#include "cuda/sort_kernels.cuh"

namespace msacore::cuda {

// Positions [count] that sort `keys` [count] (int64, clamped to [0, bound)). Equal keys keep their order, or that of
// the positions `before`, so that two calls sort by two keys.
inline Tensor sorted_positions(const Tensor& keys, int64_t bound, cudaStream_t stream, const Tensor* before = nullptr) {
  const int64_t count = keys.numel();
  const int64_t blocks = ceil_div(count, radix::kTile);
  Tensor from = empty_tensor(keys, {count}), to = empty_tensor(keys, {count});
  Tensor counts = empty_tensor(keys, {radix::kDigits * blocks});
  radix::Keys pass{keys.const_data_ptr<int64_t>(), before ? before->const_data_ptr<int64_t>() : nullptr, count, bound,
                   0};
  do {
    auto* table = counts.mutable_data_ptr<int64_t>();
    launch(radix::count_kernel, dim3(blocks), dim3(radix::kThreads), 0, stream, pass, table);
    launch(radix::exclusive_scan_kernel, dim3(count > 0), dim3(radix::kScanThreads), 0, stream, table, counts.numel());
    launch(radix::scatter_kernel, dim3(blocks), dim3(radix::kThreads), 0, stream, pass, table,
           to.mutable_data_ptr<int64_t>());
    std::swap(from, to);
    pass.position = from.const_data_ptr<int64_t>();
    pass.shift += 8;
  } while (pass.shift < 63 && (bound - 1) >> pass.shift > 0);
  return from;
}

}  // namespace msacore::cuda
