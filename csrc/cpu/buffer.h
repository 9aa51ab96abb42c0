// Scratch memory of a CPU kernel.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "core/round.h"
#include "cpu/huge_pages.h"

namespace msacore::cpu {

// Uninitialised unless a value is given, and aligned to a cache line; buffers of a huge page or more are aligned to
// huge pages, so that few pages have to be mapped.
template <typename A>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : data_(allocate(count * sizeof(A))) {}
  Buffer(int64_t count, A value) : Buffer(count) {
    for (int64_t i = 0; i < count; ++i) data_[i] = value;
  }
  A* get() const { return data_.get(); }
  A& operator[](int64_t i) const { return data_[i]; }

 private:
  // The C library serves small blocks from a per-thread cache, but never aligned blocks. Memory therefore comes from
  // malloc, and the address that malloc returned is stored just before the aligned one.
  static A* allocate(size_t bytes) {
    const size_t alignment = bytes < kHugePage ? kLine : kHugePage;
    void* const memory = std::malloc(bytes + alignment);
    if (!memory) throw std::bad_alloc();
    const auto address = (reinterpret_cast<uintptr_t>(memory) / alignment + 1) * alignment;
    void** const aligned = reinterpret_cast<void**>(address);
    aligned[-1] = memory;
    if (alignment == kHugePage) advise_huge_pages(aligned, bytes);
    return reinterpret_cast<A*>(aligned);
  }

  struct Release {
    void operator()(A* data) const { std::free(reinterpret_cast<void**>(data)[-1]); }
  };

  static constexpr size_t kLine = 64;
  std::unique_ptr<A[], Release> data_;
};

}  // namespace msacore::cpu
