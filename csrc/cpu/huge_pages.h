// Huge pages for large results. Results beyond the allocator's caching threshold are fresh memory on every call, and
// mapping it in pages of 4 KiB can take longer than computing what is written to it.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>

#include "core/round.h"
#endif

namespace msacore::cpu {

constexpr uintptr_t kHugePage = uintptr_t{1} << 21;

// Advises the system to back new memory with huge pages, where the memory covers whole ones.
inline void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t data = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = round_up(data, kHugePage), end = (data + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Returns `t`, a new CPU tensor that nothing has been written to, after advising the system to back it with huge pages.
// Where the system does not take the advice, nothing changes.
inline torch::stable::Tensor on_huge_pages(torch::stable::Tensor t) {
  advise_huge_pages(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
}

}  // namespace msacore::cpu
