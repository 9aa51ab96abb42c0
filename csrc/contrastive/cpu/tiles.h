// The passes of a contrastive loss over one tile of cosine similarities. All exponents are to base 2: the similarity s
// of two unit rows enters as s · scale with scale = log2(e) / temperature.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/exp.h"
#include "cpu/simd.h"
#include "cpu/microkernel.h"

namespace msacore::contrastive::cpu {
using namespace msacore::cpu;

constexpr int64_t kBlock = 128;                // rows and columns of a tile, at most
constexpr int64_t kTileRow = kBlock + kPanel;  // an odd number of cache lines, so that columns do not share cache sets

// While cosines of both signs stay in range of the exponent, every row can use the constant shift `scale`; otherwise
// each row and column needs its own maximum.
template <typename A>
bool is_bounded(double scale) {
  return 2 * scale < (sizeof(A) == 8 ? 1000 : 120);
}

template <typename A>
struct Tile {
  int64_t m, n;                                // rows and columns, multiples of kPanel
  A* s;                                        // [m, kTileRow] similarities, then gradients
  const A *exponent_bias_a, *exponent_bias_b;  // where a row or column takes part: -scale, or 0 with maxima; else -inf
  A scale;
  int64_t diagonal;  // the partner of row i is column i + diagonal
};

template <typename A>
MSACORE_INLINE bool takes_part(A exponent) {
  return exponent != -std::numeric_limits<A>::infinity();
}

// Takes the pairs (i, i) out of every sum.
template <typename A>
inline void exclude_diagonal(const Tile<A>& t) {
  for (int64_t i = 0; i < t.m; ++i) {
    const int64_t j = i + t.diagonal;
    if (j >= 0 && j < t.n) t.s[i * kTileRow + j] = -std::numeric_limits<A>::infinity();
  }
}

// Adds Σ_j 2^(s·scale - scale) to sum_a[i], and the same over rows to sum_b[j] unless that is null.
template <typename A>
MSACORE_SIMD void add_exponentials(const Tile<A>& t, double* __restrict__ sum_a, double* __restrict__ sum_b) {
  A columns[kBlock] = {};
  // Read once: otherwise the compiler assumes that the stores below may change the tile, and does not vectorise.
  const A scale = t.scale;
  const A* __restrict__ bias = t.exponent_bias_b;
  for (int64_t i = 0; i < t.m; ++i) {
    if (!takes_part(t.exponent_bias_a[i])) continue;
    const A* __restrict__ s = t.s + i * kTileRow;
    A row = 0;
#pragma omp simd reduction(+ : row)
    for (int64_t j = 0; j < t.n; ++j) {
      const A e = exp2_of(s[j] * scale + bias[j]);
      row += e;
      columns[j] += e;
    }
    sum_a[i] += row;
  }
  if (sum_b)
    for (int64_t j = 0; j < t.n; ++j) sum_b[j] += columns[j];
}

// The same with running maxima of similarities: Σ_j 2^((s - max_a)·scale) and Σ_i 2^((s - max_b)·scale). Differences
// come before the scale, so that exponents near the maximum are exact at any temperature.
template <typename A>
MSACORE_SIMD void add_exponentials_with_maxima(const Tile<A>& t, double* __restrict__ sum_a, A* __restrict__ max_a,
                                               double* __restrict__ sum_b, A* __restrict__ max_b) {
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const double scale = t.scale;
  A highest[kBlock], columns[kBlock] = {};
  for (int64_t j = 0; j < t.n; ++j) highest[j] = kNone;
  for (int64_t i = 0; i < t.m; ++i) {
    if (!takes_part(t.exponent_bias_a[i])) continue;
    const A* s = t.s + i * kTileRow;
    A top = max_a[i];
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < t.n; ++j) {
      const A x = s[j] + t.exponent_bias_b[j];
      top = x > top ? x : top;
      highest[j] = x > highest[j] ? x : highest[j];
    }
    const A shift = takes_part(top) ? top : A(0);
    A row = 0;
#pragma omp simd reduction(+ : row)
    for (int64_t j = 0; j < t.n; ++j) row += exp2_of((s[j] + t.exponent_bias_b[j] - shift) * t.scale);
    sum_a[i] = sum_a[i] * std::exp2((static_cast<double>(max_a[i]) - shift) * scale) + row;
    max_a[i] = top;
  }
  if (!sum_b) return;
  for (int64_t j = 0; j < t.n; ++j) highest[j] = highest[j] > max_b[j] ? highest[j] : max_b[j];
  A shift[kBlock];
  for (int64_t j = 0; j < t.n; ++j) shift[j] = takes_part(highest[j]) ? highest[j] : A(0);
  for (int64_t i = 0; i < t.m; ++i) {
    if (!takes_part(t.exponent_bias_a[i])) continue;
    const A* s = t.s + i * kTileRow;
#pragma omp simd
    for (int64_t j = 0; j < t.n; ++j) columns[j] += exp2_of((s[j] + t.exponent_bias_b[j] - shift[j]) * t.scale);
  }
  for (int64_t j = 0; j < t.n; ++j) {
    sum_b[j] = sum_b[j] * std::exp2((static_cast<double>(max_b[j]) - shift[j]) * scale) + columns[j];
    max_b[j] = highest[j];
  }
}

// s[i][j] ← 2^(s·scale - scale) (softmax_weight_a[i] + softmax_weight_b[j]): gradient of the log-sum-exps of rows and
// columns.
template <typename A>
MSACORE_SIMD void softmax_gradient(const Tile<A>& t, const A* __restrict__ softmax_weight_a,
                                   const A* __restrict__ softmax_weight_b) {
  for (int64_t i = 0; i < t.m; ++i) {
    A* s = t.s + i * kTileRow;
    if (!takes_part(t.exponent_bias_a[i])) {
      for (int64_t j = 0; j < t.n; ++j) s[j] = 0;
      continue;
    }
    const A softmax_weight = softmax_weight_a[i];
#pragma omp simd
    for (int64_t j = 0; j < t.n; ++j)
      s[j] = exp2_of(s[j] * t.scale + t.exponent_bias_b[j]) * (softmax_weight + softmax_weight_b[j]);
  }
}

// The softmax of rows or columns in a gradient: softmax_weight · 2^((s - shift)·scale - log).
template <typename A>
struct Softmax {
  const A *softmax_weight, *shift, *log;
};

// softmax_gradient for log-sum-exps of any size.
template <typename A>
MSACORE_SIMD void softmax_gradient_with_maxima(const Tile<A>& t, const Softmax<A>& a, const Softmax<A>& b) {
  const A* __restrict__ softmax_weight_b = b.softmax_weight, * __restrict__ shift_b = b.shift, * __restrict__ log_b = b.log;
  for (int64_t i = 0; i < t.m; ++i) {
    A* s = t.s + i * kTileRow;
    if (!takes_part(t.exponent_bias_a[i])) {
      for (int64_t j = 0; j < t.n; ++j) s[j] = 0;
      continue;
    }
    const A softmax_weight = a.softmax_weight[i], shift = a.shift[i], log = a.log[i];
#pragma omp simd
    for (int64_t j = 0; j < t.n; ++j) {
      const A x = s[j] + t.exponent_bias_b[j];
      s[j] = softmax_weight * exp2_of((x - shift) * t.scale - log) +
             softmax_weight_b[j] * exp2_of((x - shift_b[j]) * t.scale - log_b[j]);
    }
  }
}

}  // namespace msacore::contrastive::cpu
