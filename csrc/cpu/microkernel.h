// Matrix products on cache-sized tiles, called from within a thread: no dispatcher call per product, and one source for
// all vector widths.
#pragma once
#include <cstdint>

#include "core/round.h"
#include "cpu/simd.h"

namespace msacore::cpu {

constexpr int64_t kPanel = 16;  // sizes are padded to multiples of this

inline int64_t padded(int64_t n) { return round_up(n, kPanel); }

// Rows × vectors of the result that stay in registers; kBytes is the width of a vector register. With 32 registers,
// 8 × 3 needs 11 loads for 24 multiplications, where 16 × 1 would need 17 for 16.
template <typename A, int kBytes>
struct RegisterBlock {
  static constexpr int kWidth = kBytes / static_cast<int>(sizeof(A));
  static constexpr int kVectors = kBytes == 64 ? 3 : 2;
  static constexpr int kRows = kBytes == 64 ? 8 : 6;
};

template <typename A>
struct Product {
  int64_t m, n, depth;
  const A* a;
  int64_t row_a, step_a;
  const A* b;
  int64_t panel_b, step_b;
  A* c;
  int64_t row_c;
  bool add;

  const A* columns_of_b(int64_t j) const { return b + j / kPanel * panel_b + j % kPanel; }
};

// kRows rows of c from row i, kVectors vectors from column j (+)= a · b.
template <typename A, int kBytes, int kRows, int kVectors>
MSACORE_INLINE void register_product(const Product<A>& t, int64_t i, int64_t j) {
  typedef A Vector __attribute__((vector_size(kBytes)));
  typedef A Memory __attribute__((vector_size(kBytes), aligned(sizeof(A)), may_alias));
  constexpr int kWidth = kBytes / static_cast<int>(sizeof(A));
  const int64_t depth = t.depth, row_a = t.row_a, step_a = t.step_a, step_b = t.step_b, row_c = t.row_c;
  const A *const a = t.a + i * row_a, *b[kVectors];
  A* const c = t.c + i * row_c + j;
  Vector sum[kRows][kVectors];
#pragma GCC unroll 3
  for (int v = 0; v < kVectors; ++v) b[v] = t.columns_of_b(j + v * kWidth);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(c + r * row_c + v * kWidth, 1);  // c may be in an outer cache
      sum[r][v] = Vector{};
    }
  for (int64_t p = 0; p < depth; ++p) {
    Vector right[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Memory*>(b[v] + p * step_b);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const A left = a[r * row_a + p * step_a];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      Memory* out = reinterpret_cast<Memory*>(c + r * row_c + v * kWidth);
      *out = t.add ? *out + sum[r][v] : sum[r][v];
    }
}

// Prefetches the columns of the next strip of b, a share at a time, while the current strip is multiplied: the rows of
// b may be too far apart for hardware prefetchers to see the pattern.
template <typename A, int kSpan>
class Ahead {
 public:
  MSACORE_INLINE Ahead(const Product<A>& t, int64_t j, int64_t times)
      : t_(t), begin_(j), end_(j + kSpan < t.n ? j + kSpan : t.n), share_(ceil_div(t.depth, times)) {}

  MSACORE_INLINE void fetch() {
    constexpr int64_t kLine = 64 / sizeof(A);
    const int64_t until = row_ + share_ < t_.depth ? row_ + share_ : t_.depth;
    for (int64_t k = begin_; k < end_; k += kLine)
      for (int64_t p = row_; p < until; ++p) __builtin_prefetch(t_.columns_of_b(k) + p * t_.step_b);
    row_ = until;
  }

 private:
  const Product<A>& t_;
  int64_t begin_, end_, share_, row_ = 0;
};

// All rows of c in a strip of kVectors vectors of columns.
template <typename A, int kBytes, int kRows, int kVectors>
MSACORE_INLINE void strip_product(const Product<A>& t, int64_t j) {
  constexpr int kSpan = kVectors * kBytes / static_cast<int>(sizeof(A));
  // Blocks of six rows leave two or three rows over for some sizes; two blocks of four then keep more sums in flight.
  const int64_t left = t.m % kRows;
  const bool borrow = (left == 2 || left == 3) && t.m > kRows;
  const int64_t full = t.m - left - (borrow ? kRows : 0);
  Ahead<A, kSpan> ahead(t, j + kSpan, ceil_div(t.m, int64_t{kRows}));
  int64_t i = 0;
  for (; i < full; i += kRows) {
    ahead.fetch();
    register_product<A, kBytes, kRows, kVectors>(t, i, j);
  }
  for (; i + 4 <= t.m; i += 4) register_product<A, kBytes, 4, kVectors>(t, i, j);
  for (; i < t.m; ++i) register_product<A, kBytes, 1, kVectors>(t, i, j);
}

template <typename A, int kBytes>
MSACORE_INLINE void strips_product(const Product<A>& t) {
  using Block = RegisterBlock<A, kBytes>;
  constexpr int kWidth = Block::kWidth, kSpan = kWidth * Block::kVectors;
  int64_t j = 0;
  for (; j + kSpan <= t.n; j += kSpan) strip_product<A, kBytes, Block::kRows, Block::kVectors>(t, j);
  if constexpr (Block::kVectors == 3) {
    if (j + 2 * kWidth <= t.n) strip_product<A, kBytes, Block::kRows, 2>(t, j), j += 2 * kWidth;
    if (j < t.n) strip_product<A, kBytes, 2 * Block::kRows, 1>(t, j);
  }
}

// Splits the depth into parts whose strips of b stay in the innermost cache.
template <typename A, int kBytes>
MSACORE_INLINE void product_body(const Product<A>& whole) {
  constexpr int64_t kStripBytes = 36 << 10;
  constexpr int64_t kMost = kStripBytes / (RegisterBlock<A, kBytes>::kVectors * kBytes);
  const int64_t parts = whole.depth > kMost ? ceil_div(whole.depth, kMost) : 1, depth = ceil_div(whole.depth, parts);
  Product<A> t = whole;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * depth;
    t.depth = whole.depth - first < depth ? whole.depth - first : depth;
    t.a = whole.a + first * t.step_a;
    t.b = whole.b + first * t.step_b;
    t.add = whole.add || part > 0;
    strips_product<A, kBytes>(t);
  }
}

template <typename A>
MSACORE_AVX512 void product_avx512(const Product<A>& t) {
  product_body<A, 64>(t);
}

template <typename A>
MSACORE_AVX2 void product_avx2(const Product<A>& t) {
  product_body<A, 32>(t);
}

template <typename A>
void product_baseline(const Product<A>& t) {
  product_body<A, 16>(t);
}

// c [m, n] (+)= a [m, depth] · b [depth, n], n a multiple of kPanel. Element (i, p) of a is a[i·row_a + p·step_a]; b
// consists of panels of kPanel columns, `panel_b` apart, with rows `step_b` apart.
template <typename A>
void small_product(const Product<A>& t) {
  switch (vector_bytes()) {
    case 64:
      return product_avx512<A>(t);
    case 32:
      return product_avx2<A>(t);
    default:
      return product_baseline<A>(t);
  }
}

}  // namespace msacore::cpu
