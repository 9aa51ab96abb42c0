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
  explicit Buffer(int64_t count) : data_(allocate(count * sizeof(A)), &std::free) {}
  Buffer(int64_t count, A value) : Buffer(count) {
    for (int64_t i = 0; i < count; ++i) data_[i] = value;
  }
  A* get() const { return data_.get(); }
  A& operator[](int64_t i) const { return data_[i]; }

 private:
  static A* allocate(size_t bytes) {
    const size_t alignment = bytes < kHugePage ? 64 : kHugePage;
    void* const memory = std::aligned_alloc(alignment, round_up(std::max<size_t>(bytes, 1), alignment));
    if (!memory) throw std::bad_alloc();
    if (alignment == kHugePage) advise_huge_pages(memory, bytes);
    return static_cast<A*>(memory);
  }

  std::unique_ptr<A[], void (*)(void*)> data_{nullptr, &std::free};
};

}  // namespace msacore::cpu
