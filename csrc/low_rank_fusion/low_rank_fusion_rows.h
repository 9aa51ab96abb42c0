// Passes over rows of low-rank fusion. Rows are padded to whole panels, so that every loop has a fixed length.
#pragma once
#include <cstdint>

#include "cpu/simd.h"
#include "cpu/microkernel.h"

namespace msacore::low_rank_fusion::cpu {
using namespace msacore::cpu;

constexpr int64_t kTileRows = 128;  // per tile: its projections of all modalities stay in a core's cache

// The projections of a tile for one rank: those of modality m are [rows, width], and `apart` numbers further those of
// the next.
template <typename A>
struct Tile {
  A* a;
  int64_t modalities, width, rows, apart;

  MSACORE_INLINE A* at(int64_t m, int64_t b, int64_t j) const { return a + m * apart + b * width + j; }
};

// sum[b] += weight · Π_m a[m, b]
template <typename A>
MSACORE_SIMD void combine(const Tile<A>& a, A weight, A* __restrict__ sum) {
  const int64_t width = a.width;
  for (int64_t b = 0; b < a.rows; ++b)
    for (int64_t j = 0; j < width; j += kPanel) {
      A product[kPanel];
      for (int64_t v = 0; v < kPanel; ++v) product[v] = weight;
      for (int64_t m = 0; m < a.modalities; ++m) {
        const A* __restrict__ factor = a.at(m, b, j);
        for (int64_t v = 0; v < kPanel; ++v) product[v] *= factor[v];
      }
      A* __restrict__ row = sum + b * width + j;
      for (int64_t v = 0; v < kPanel; ++v) row[v] += product[v];
    }
}

// grad_a[m, b] = weight · grad_out[b] · Π_{n ≠ m} a[n, b], in [M, kTileRows, width]; returns the gradient of the
// weight.
template <typename A>
MSACORE_SIMD double combine_backward(const Tile<A>& a, A weight, const A* __restrict__ grad_out,
                                     A* __restrict__ grad_a) {
  const int64_t width = a.width;
  double grad_weight = 0;
  for (int64_t b = 0; b < a.rows; ++b) {
    A dots[kPanel] = {};
    for (int64_t j = 0; j < width; j += kPanel) {
      const A* __restrict__ g = grad_out + b * width + j;
      for (int64_t m = 0; m < a.modalities; ++m) {
        A product[kPanel];
        for (int64_t v = 0; v < kPanel; ++v) product[v] = g[v];
        for (int64_t n = 0; n < a.modalities; ++n) {
          if (n == m) continue;
          const A* __restrict__ factor = a.at(n, b, j);
          for (int64_t v = 0; v < kPanel; ++v) product[v] *= factor[v];
        }
        if (m == 0) {
          const A* __restrict__ own = a.at(0, b, j);
          for (int64_t v = 0; v < kPanel; ++v) dots[v] += product[v] * own[v];
        }
        A* __restrict__ target = grad_a + (m * kTileRows + b) * width + j;
        for (int64_t v = 0; v < kPanel; ++v) target[v] = weight * product[v];
      }
    }
    A dot = 0;
    for (int64_t v = 0; v < kPanel; ++v) dot += dots[v];
    grad_weight += dot;
  }
  return grad_weight;
}

// Panels of the columns j of a [d, width] matrix's transpose: panels[j / kPanel][p][j % kPanel] = from[j][p].
template <typename A>
MSACORE_SIMD void transpose_panels(const A* __restrict__ from, int64_t d, int64_t step, int64_t width,
                                   A* __restrict__ panels) {
  for (int64_t j = 0; j < d; j += kPanel) {
    const int64_t full = d - j < kPanel ? d - j : kPanel;
    for (int64_t p = 0; p < width; ++p, panels += kPanel)
      for (int64_t v = 0; v < kPanel; ++v) panels[v] = v < full ? from[(j + v) * step + p] : A(0);
  }
}

// to[i] += from[i]
template <typename A>
MSACORE_SIMD void add(const A* __restrict__ from, A* __restrict__ to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// sum[j] = Σ_i rows[i, j]
template <typename A>
MSACORE_SIMD void column_sums(const A* __restrict__ rows, int64_t count, int64_t width, double* __restrict__ sum) {
  for (int64_t j = 0; j < width; ++j) sum[j] = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < width; ++j) sum[j] += rows[i * width + j];
}

}  // namespace msacore::low_rank_fusion::cpu
