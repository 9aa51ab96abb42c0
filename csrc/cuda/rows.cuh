// Rows of [rows, width] distributed over groups of lanes.
#pragma once
#include "cuda/device.cuh"

namespace msacore::cuda {

// The lanes that own a row: a power of two, so that a thread finds its row and place without a division.
struct Lanes {
  int shift;

  Lanes(int64_t width, int vector) : shift(0) {
    while (count() < kWarp && count() * vector < width) ++shift;
  }
  __host__ __device__ int count() const { return 1 << shift; }
  __device__ int64_t first_row() const { return grid_thread() >> shift; }
  __device__ int64_t next_row() const { return grid_threads() >> shift; }
  __device__ int lane() const { return static_cast<int>(grid_thread()) & (count() - 1); }
};

// Whether width and addresses allow each lane of a row to take 16 bytes of the accumulation type; otherwise lanes take
// single elements.
template <typename A>
bool can_vectorise(int64_t width, std::initializer_list<const void*> pointers) {
  bool aligned = width % kPer16<A> == 0;
  for (const void* p : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return aligned;
}

__device__ __forceinline__ int64_t clamped(int64_t value, int64_t bound) {
  return value < 0 ? 0 : value >= bound ? bound - 1 : value;
}

// The first place in sorted values(0) … values(count - 1) whose value is at least `wanted`.
template <typename Values>
__device__ __forceinline__ int64_t lower_bound(int64_t count, int64_t wanted, Values values) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (values(low + half) < wanted) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

}  // namespace msacore::cuda
