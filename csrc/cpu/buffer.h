// Scratch memory of a CPU kernel.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace msacore::cpu {

// Uninitialised, aligned to a cache line.
template <typename A>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : data_(static_cast<A*>(std::aligned_alloc(64, (count * sizeof(A) + 64) / 64 * 64)), &std::free) {
    if (!data_) throw std::bad_alloc();
  }
  Buffer(int64_t count, A value) : Buffer(count) {
    for (int64_t i = 0; i < count; ++i) data_[i] = value;
  }
  A* get() const { return data_.get(); }
  A& operator[](int64_t i) const { return data_[i]; }

 private:
  std::unique_ptr<A[], void (*)(void*)> data_{nullptr, &std::free};
};

}  // namespace msacore::cpu
