// One conversation, one cache line of columns: the tile in which window means are computed, and the passes over it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace msacore::propagation::cpu {
using namespace msacore::cpu;

// 64 bytes of one node's columns as two vectors, which AVX2 holds in registers; older sets split them.
template <typename A>
struct alignas(64) Row {
  using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef A Vector __attribute__((vector_size(32)));
  typedef Bits BitVector __attribute__((vector_size(32)));
  static constexpr int64_t kWidth = 64 / sizeof(A);

  Vector low, high;

  // The row where `bits` is all ones, zeros where it is 0: a NaN is dropped too, which a product would keep.
  MSACORE_INLINE Row where(Bits bits) const {
    const BitVector mask = BitVector{} + bits;
    return {(Vector)((BitVector)low & mask), (Vector)((BitVector)high & mask)};
  }
};

template <typename A>
MSACORE_INLINE Row<A> operator+(const Row<A>& a, const Row<A>& b) {
  return {a.low + b.low, a.high + b.high};
}

template <typename A>
MSACORE_INLINE Row<A> operator*(A scale, const Row<A>& a) {
  return {scale * a.low, scale * a.high};
}

// Reads `rows` rows of `width` ≤ Row::kWidth columns, `stride` apart.
template <typename T, typename A>
MSACORE_SIMD void load_rows(const T* __restrict__ from, int64_t stride, int64_t rows, int64_t width,
                            Row<A>* __restrict__ to) {
  constexpr int64_t kWidth = Row<A>::kWidth;
  if (width == kWidth) {
    for (int64_t r = 0; r < rows; ++r) {
      A* row = reinterpret_cast<A*>(to + r);
      for (int64_t c = 0; c < kWidth; ++c) row[c] = static_cast<A>(from[r * stride + c]);
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    A* row = reinterpret_cast<A*>(to + r);
    for (int64_t c = 0; c < kWidth; ++c) row[c] = c < width ? static_cast<A>(from[r * stride + c]) : A(0);
  }
}

template <typename T, typename A>
MSACORE_SIMD void store_rows(const Row<A>* __restrict__ from, int64_t rows, int64_t width, T* __restrict__ to,
                             int64_t stride) {
  constexpr int64_t kWidth = Row<A>::kWidth;
  for (int64_t r = 0; r < rows; ++r) {
    const A* row = reinterpret_cast<const A*>(from + r);
    if (width == kWidth)
      for (int64_t c = 0; c < kWidth; ++c) to[r * stride + c] = static_cast<T>(row[c]);
    else
      for (int64_t c = 0; c < width; ++c) to[r * stride + c] = static_cast<T>(row[c]);
  }
}

// Window sums over the `length` utterances of h [length, M], each handed to use(i, sums [M]).
//
// The utterances are cut into blocks as long as a window, so that every window is the end of one block and the start of
// the next: two additions per element whatever the width, and no difference of running sums, which would lose digits
// and carry a NaN beyond the windows that hold it. kM > 0 fixes M at compile time and keeps sums in registers; else
// `work` holds 2·M rows. `ends` holds min(window, length) · M rows.
template <int kM, typename A, typename Use>
MSACORE_INLINE void for_each_window(const Row<A>* __restrict__ h, int64_t length, int64_t modalities, int64_t past,
                                    int64_t future, Row<A>* __restrict__ ends, Row<A>* __restrict__ work,
                                    const Use& use) {
  const int64_t M = kM > 0 ? kM : modalities;
  const int64_t window = past + future + 1;
  Row<A> in_registers[kM > 0 ? 2 * kM : 1];
  Row<A>* sum = kM > 0 ? in_registers : work;
  Row<A>* total = sum + M;
  for (int64_t first = 0; first < length; first += window) {
    const int64_t begin = first - past, count = std::min(window, length - first);
    const int64_t before = std::max<int64_t>(0, -begin);  // leading positions that precede the conversation
    for (int64_t m = 0; m < M; ++m) sum[m] = Row<A>{};
    for (int64_t j = std::min(begin + window, length) - 1; j >= begin + before; --j) {
      for (int64_t m = 0; m < M; ++m) sum[m] = sum[m] + h[j * M + m];
      if (j - begin < count)
        for (int64_t m = 0; m < M; ++m) ends[(j - begin) * M + m] = sum[m];
    }
    for (int64_t m = 0; m < M; ++m) sum[m] = Row<A>{};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t last = begin + window + r - 1;
      if (r > 0 && last < length)
        for (int64_t m = 0; m < M; ++m) sum[m] = sum[m] + h[last * M + m];
      const Row<A>* end = ends + std::max(r, before) * M;
      for (int64_t m = 0; m < M; ++m) total[m] = end[m] + sum[m];
      use(first + r, total);
    }
  }
}

// out[m] = Σ_{n ≠ m} in[n], without the difference that would let a NaN reach its own modality.
template <int kM, typename A>
MSACORE_INLINE void sum_others(const Row<A>* in, int64_t modalities, Row<A>* out) {
  const int64_t M = kM > 0 ? kM : modalities;
  if (M == 1) {
    out[0] = Row<A>{};
    return;
  }
  out[1] = in[0];
  for (int64_t m = 2; m < M; ++m) out[m] = out[m - 1] + in[m - 1];
  Row<A> after = in[M - 1];
  for (int64_t m = M - 2; m > 0; --m) {
    out[m] = out[m] + after;
    after = in[m] + after;
  }
  out[0] = after;
}

}  // namespace msacore::propagation::cpu
