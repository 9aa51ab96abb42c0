// Rows [x, 1], some of them hidden, as an operand of a product.
#pragma once
#include "cuda/tile_product.cuh"

namespace msacore::cuda {

// Copies 16 bytes of row `row` of [x, 1], from column j on; rows of x have `features` columns. Where x is not `seen` it
// is not read, and zeros stand before the 1; `one` says whether there is a 1. `aligned`: rows of x begin at multiples
// of 16 bytes.
template <typename T>
__device__ __forceinline__ void copy_augmented(T* to, const T* x, int64_t row, int64_t j, int64_t features, bool seen,
                                               bool one, bool aligned) {
  const T* const from = x + (seen && j < features ? row * features + j : 0);
  if (aligned && j + kPer16<T> <= features) {
    async_copy16(to, from, seen);
    return;
  }
  Vector<T, kPer16<T>> chunk;
#pragma unroll
  for (int e = 0; e < kPer16<T>; ++e) {
    chunk.at[e] = T(0.0f);
    if (j + e == features && one) chunk.at[e] = T(1.0f);
    if (j + e < features && seen) chunk.at[e] = from[e];
  }
  store(to, chunk);
}

}  // namespace msacore::cuda
