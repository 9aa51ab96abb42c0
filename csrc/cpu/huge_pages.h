// Large pages for large results. Results beyond the allocator's caching threshold come as fresh memory on every call,
// and to map it page by page of 4 KiB can take longer than to compute what goes in.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>

#include "core/round.h"
#endif

namespace msacore::cpu {

// `t`, a new CPU tensor nothing has been written to, with the system advised to back it by large pages. Where it does
// not take the advice nothing changes.
inline torch::stable::Tensor on_huge_pages(torch::stable::Tensor t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t begin = round_up(data, kPage), end = (data + t.numel() * t.element_size()) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return t;
}

}  // namespace msacore::cpu
