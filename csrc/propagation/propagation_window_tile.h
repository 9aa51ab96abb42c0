// One conversation, one cache line of columns: the tile in which window means are computed, and the passes over it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/simd.h"

namespace msacore::propagation::cpu {
using namespace msacore::cpu;

// 64 bytes of one node's columns as two vectors, which fit AVX2 registers; older instruction sets split them.
template <typename A>
struct alignas(64) Row {
  using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef A Vector __attribute__((vector_size(32)));
  typedef Bits BitVector __attribute__((vector_size(32)));
  static constexpr int64_t kWidth = 64 / sizeof(A);

  Vector low, high;

  // The row where `bits` is all ones, zeros where it is 0. This drops a NaN too, which a product would keep.
  MSACORE_INLINE Row where(Bits bits) const {
    const BitVector mask = BitVector{} + bits;
    return {(Vector)((BitVector)low & mask), (Vector)((BitVector)high & mask)};
  }
};

// The largest |value| of rows, column by column of half a row. Comparisons with NaN leave it as it is.
template <typename A>
struct Largest {
  using Vector = typename Row<A>::Vector;
  using BitVector = typename Row<A>::BitVector;
  Vector low{}, high{};

  MSACORE_INLINE void take(const Row<A>& row) {
    const BitVector sizes = BitVector{} + std::numeric_limits<typename Row<A>::Bits>::max();
    const Vector row_low = (Vector)((BitVector)row.low & sizes), row_high = (Vector)((BitVector)row.high & sizes);
    low = row_low > low ? row_low : low;
    high = row_high > high ? row_high : high;
  }
  MSACORE_INLINE bool exceeds(A limit) const {
    typedef int64_t Words __attribute__((vector_size(32)));
    const Words any = (Words)((low > high ? low : high) > Vector{} + limit);
    return (any[0] | any[1] | any[2] | any[3]) != 0;
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

// Reads `rows` rows of `width` ≤ Row::kWidth columns, `stride` apart; returns whether any |value| > limit, as is
// the case for inf and not for NaN.
template <typename T, typename A>
MSACORE_SIMD bool load_rows(const T* __restrict__ from, int64_t stride, int64_t rows, int64_t width,
                            Row<A>* __restrict__ to, A limit) {
  constexpr int64_t kWidth = Row<A>::kWidth;
  Largest<A> largest;
  if (width == kWidth) {
    for (int64_t r = 0; r < rows; ++r) {
      A* row = reinterpret_cast<A*>(to + r);
      for (int64_t c = 0; c < kWidth; ++c) row[c] = static_cast<A>(from[r * stride + c]);
      largest.take(to[r]);
    }
    return largest.exceeds(limit);
  }
  for (int64_t r = 0; r < rows; ++r) {
    A* row = reinterpret_cast<A*>(to + r);
    for (int64_t c = 0; c < kWidth; ++c) row[c] = c < width ? static_cast<A>(from[r * stride + c]) : A(0);
    largest.take(to[r]);
  }
  return largest.exceeds(limit);
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

// Σ h[j] over a window of rows of h [length, M] whose ends never move back, kept as Σ h[first … middle), stored for
// every first row, plus Σ h[middle … end).
//
// A row is added once when it enters, once when the stored sums are used up and are rebuilt from the whole window, and
// once when the two sums are joined: three additions whatever the width. No difference of running sums is taken, which
// would lose digits and carry a NaN beyond the windows that hold it. `stored` holds max(longest window, 1) · M rows,
// `sum` M rows.
template <int kM, typename A>
struct SlidingSum {
  const Row<A>* h;
  int64_t modalities;
  Row<A>*stored, *sum;
  int64_t start = 0, middle = 0, end = 0;

  // Moves the window to rows first … last; it is empty where last is first - 1.
  MSACORE_INLINE void move(int64_t first, int64_t last) {
    const int64_t M = kM > 0 ? kM : modalities;
    if (first < middle) {
      for (; end <= last; ++end)
        for (int64_t m = 0; m < M; ++m) sum[m] = sum[m] + h[end * M + m];
      return;
    }
    for (int64_t m = 0; m < M; ++m) sum[m] = Row<A>{};
    for (int64_t j = last; j >= first; --j)
      for (int64_t m = 0; m < M; ++m) stored[(j - first) * M + m] = sum[m] = sum[m] + h[j * M + m];
    for (int64_t m = 0; m < M; ++m) sum[m] = Row<A>{};
    if (last < first)
      for (int64_t m = 0; m < M; ++m) stored[m] = Row<A>{};
    start = first;
    middle = end = last + 1;
  }
  MSACORE_INLINE Row<A> total(int64_t first, int64_t m) const {
    return stored[(first - start) * (kM > 0 ? kM : modalities) + m] + sum[m];
  }
};

// Rows [first[i], last[i]] are within reach of row i, i itself among them. Where no positions are given, these are the
// rows i - past … i + future, as far as they exist; both numbers are less than the length, and `by_number` is set.
struct Reach {
  const int64_t *first, *last;
  int64_t past, future;
  bool by_number;
};

// Memory of for_each_window, in rows: `stored` [2, length + 1, M], `sums` [3, M].
template <typename A>
struct WindowRows {
  Row<A>*stored, *sums;
};

// for_each_window for rows i - past … i + future, with `past` and `future` less than `length`: the additions of a
// SlidingSum with fewer instructions around them, as its stored sums always serve past + future + 1 rows. `ends` holds
// (length + 1) · M rows, `sums` 2 M rows.
template <int kM, typename A, typename Use>
MSACORE_INLINE void for_each_equal_window(const Row<A>* __restrict__ h, int64_t length, int64_t modalities,
                                          int64_t past, int64_t future, Row<A>* __restrict__ ends, Row<A>* sums,
                                          const Use& use) {
  const int64_t M = kM > 0 ? kM : modalities;
  const int64_t window = past + future + 1;
  Row<A> in_registers[kM > 0 ? 2 * kM : 1];
  Row<A>* sum = kM > 0 ? in_registers : sums;
  Row<A>* total = sum + M;
  for (int64_t first = 0; first < length; first += window) {
    const int64_t begin = first - past, count = std::min(window, length - first);
    const int64_t before = std::max<int64_t>(0, -begin);  // rows of the first window that do not exist
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

// Calls use(i, sums [M]) with the window sums of each of the `length` rows i of h [length, M]. Without `include_self`,
// the rows before i and the rows after i are two windows. kM > 0 fixes M at compile time and keeps sums in registers.
template <int kM, typename A, typename Use>
MSACORE_INLINE void for_each_window(const Row<A>* h, int64_t length, int64_t modalities, const Reach& reach,
                                    bool include_self, const WindowRows<A>& rows, const Use& use) {
  if (include_self && reach.by_number)
    return for_each_equal_window<kM>(h, length, modalities, reach.past, reach.future, rows.stored, rows.sums, use);
  const int64_t M = kM > 0 ? kM : modalities;
  Row<A> in_registers[kM > 0 ? 2 * kM : 1];
  Row<A>* total = kM > 0 ? in_registers : rows.sums;
  SlidingSum<kM, A> window{h, M, rows.stored, kM > 0 ? in_registers + kM : rows.sums + M};
  SlidingSum<kM, A> later{h, M, rows.stored + (length + 1) * M, rows.sums + 2 * M};
  for (int64_t i = 0; i < length; ++i) {
    const int64_t first = reach.first[i], last = reach.last[i];
    window.move(first, include_self ? last : i - 1);
    for (int64_t m = 0; m < M; ++m) total[m] = window.total(first, m);
    if (!include_self) {
      later.move(i + 1, last);
      for (int64_t m = 0; m < M; ++m) total[m] = total[m] + later.total(i + 1, m);
    }
    use(i, total);
  }
}

// out[m] = Σ_{n ≠ m} in[n], without subtracting in[m] from a total, which would let a NaN reach its own modality.
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
