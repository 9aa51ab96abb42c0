// Matrix products on cache-sized tiles, called from within a thread: no dispatcher call per product, one file of code
// for every vector width.
#pragma once
#include <cstdint>

#include "core/round.h"
#include "cpu/simd.h"

namespace msacore::cpu {

constexpr int64_t kPanel = 16;  // sizes are padded to multiples of this

inline int64_t padded(int64_t n) { return round_up(n, kPanel); }

// Rows × vectors of the result that stay in registers; kBytes is the width of a vector register.
template <typename A, int kBytes>
struct RegisterBlock {
  static constexpr int kWidth = kBytes / static_cast<int>(sizeof(A));
  static constexpr int kVectors = kWidth >= kPanel ? 1 : 2;
  static constexpr int kRows = kBytes == 64 ? (kVectors == 1 ? 16 : 8) : 6;
};

// c (+)= a · b for kRows rows of a (strides row_a, step_a) and kVectors vectors of each row of b.
template <typename A, int kBytes, int kRows, int kVectors>
MSACORE_INLINE void register_product(int64_t depth, const A* a, int64_t row_a, int64_t step_a, const A* b,
                                     int64_t step_b, A* c, int64_t row_c, bool add) {
  typedef A Vector __attribute__((vector_size(kBytes)));
  typedef A Memory __attribute__((vector_size(kBytes), aligned(sizeof(A)), may_alias));
  constexpr int kWidth = kBytes / static_cast<int>(sizeof(A));
  Vector sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) __builtin_prefetch(c + i * row_c, 1);  // it may be in an outer cache
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector{};
  for (int64_t p = 0; p < depth; ++p) {
    Vector right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Memory*>(b + p * step_b + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const A left = a[i * row_a + p * step_a];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Memory* out = reinterpret_cast<Memory*>(c + i * row_c + v * kWidth);
      *out = add ? *out + sum[i][v] : sum[i][v];
    }
}

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
};

template <typename A, int kBytes, int kRows>
MSACORE_INLINE void rows_product(const Product<A>& t, int64_t i, int64_t j) {
  register_product<A, kBytes, kRows, RegisterBlock<A, kBytes>::kVectors>(
      t.depth, t.a + i * t.row_a, t.row_a, t.step_a, t.b + j / kPanel * t.panel_b + j % kPanel, t.step_b,
      t.c + i * t.row_c + j, t.row_c, t.add);
}

template <typename A, int kBytes>
MSACORE_INLINE void product_body(const Product<A>& t) {
  using Block = RegisterBlock<A, kBytes>;
  // Six rows at a time leave two or three of some sizes; two blocks of four then keep more sums in flight.
  const int64_t left = t.m % Block::kRows;
  const bool borrow = (left == 2 || left == 3) && t.m > Block::kRows;
  const int64_t full = t.m - left - (borrow ? Block::kRows : 0);
  for (int64_t j = 0; j < t.n; j += Block::kWidth * Block::kVectors) {
    int64_t i = 0;
    for (; i < full; i += Block::kRows) rows_product<A, kBytes, Block::kRows>(t, i, j);
    for (; i + 4 <= t.m; i += 4) rows_product<A, kBytes, 4>(t, i, j);
    for (; i < t.m; ++i) rows_product<A, kBytes, 1>(t, i, j);
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

// c [m, n] (+)= a [m, depth] · b [depth, n], n a multiple of kPanel. Element (i, p) of a is a[i·row_a + p·step_a];
// b comes as panels of kPanel columns, `panel_b` apart, whose rows are `step_b` apart.
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
