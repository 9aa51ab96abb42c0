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

// Uninitialised, aligned to a cache line; memory of more than a large page to that, so that few pages have to be
// mapped.
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
  // The C library hands small blocks out of a cache of the thread, but aligned ones never: they take malloc, and the
  // address that it returned stands before the aligned one.
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
