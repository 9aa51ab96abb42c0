// The rows of one embedding as contrastive losses on the CPU use them: scaled to unit length or as they are, padded to
// whole panels, with the gradient with respect to them.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "contrastive/cpu/pair_rows.h"
#include "contrastive/cpu/tiles.h"
#include "core/dtype.h"
#include "cpu/buffer.h"
#include "cpu/parallel.h"

namespace msacore::contrastive::cpu {
using namespace msacore::cpu;

// Rows that lie in one tensor or, one after the other, in two.
template <typename T>
struct Source {
  const T* first;
  int64_t count;  // rows of `first`
  const T* second;

  const T* row(int64_t i, int64_t d) const { return i < count ? first + i * d : second + (i - count) * d; }
};

// |x|² of a row times lift⁴, where the power of two `lift` keeps it in the range of double.
template <typename A>
MSACORE_INLINE double square_of(const A* __restrict__ x, int64_t d, double& lift) {
  const auto sum_of_squares = [&] {
    double square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t k = 0; k < d; ++k) {
      const double value = static_cast<double>(x[k]) * lift * lift;
      square += value * value;
    }
    return square;
  };
  lift = 1;
  double square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t k = 0; k < d; ++k) {
    const double value = static_cast<double>(x[k]);
    square += value * value;
  }
  if constexpr (std::is_same_v<A, double>) {
    if (square > 1e-280 && square < 1e280) return square;
    double largest = 0;
    for (int64_t k = 0; k < d; ++k) largest = std::max(largest, std::abs(x[k]));
    if (largest == 0 || !std::isfinite(largest)) return square;
    lift = std::ldexp(1.0, -std::ilogb(largest) / 2);
    return sum_of_squares();
  }
  return square;
}

// unit [rows, stride] ← x / |x|, or x where not `normalize`; panels, unless null, ← the same transposed in panels of
// kPanel rows. Rows that take no part are not read and become zero, as do zero rows. Handles rows begin … end,
// multiples of kPanel.
template <typename T, typename A>
MSACORE_SIMD void normalise_rows(const Source<T>& x, const uint8_t* __restrict__ used, bool normalize,
                                 A* __restrict__ unit, A* __restrict__ panels, double* __restrict__ inverse_norm,
                                 double* __restrict__ lifts, int64_t n, int64_t d, int64_t width, int64_t stride,
                                 int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    A* row = unit + i * stride;
    for (int64_t k = 0; k < width; ++k) row[k] = 0;
    inverse_norm[i] = 0;
    if (lifts) lifts[i] = 1;
    if (i >= n || !used[i]) continue;
    const T* __restrict__ from = x.row(i, d);
    for (int64_t k = 0; k < d; ++k) row[k] = static_cast<A>(from[k]);  // sums over a 16-bit row would not be vectorised
    double lift = 1, inverse = 1;
    if (normalize) {
      const double square = square_of(row, d, lift);
      inverse = square == 0 ? 0 : 1 / std::sqrt(square);
    }
    inverse_norm[i] = inverse;
    if (lift == 1) {
      for (int64_t k = 0; k < d; ++k) row[k] = static_cast<A>(row[k] * inverse);
    } else {
      lifts[i] = lift;
      for (int64_t k = 0; k < d; ++k) row[k] = static_cast<A>(static_cast<double>(row[k]) * lift * lift * inverse);
    }
  }
  for (int64_t i = begin; panels && i < end; i += kPanel)
    for (int64_t k = 0; k < width; ++k)
      for (int64_t r = 0; r < kPanel; ++r) panels[i * width + k * kPanel + r] = unit[(i + r) * stride + k];
}

// grad_x ← (g - <g, u> u) scale / |x|, or g · scale where not `normalize`, and pull ← <g, u>; zero for a row that
// takes no part.
template <typename T, typename A>
MSACORE_INLINE void project_row(const A* __restrict__ g, const A* __restrict__ u, double inverse, double lift,
                                bool normalize, T* __restrict__ grad_x, double& pull, A scale, int64_t d) {
  A dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t k = 0; k < d; ++k) dot += g[k] * u[k];
  pull = dot;
  if (inverse == 0) {
    for (int64_t k = 0; k < d; ++k) grad_x[k] = static_cast<T>(0.0f);
    return;
  }
  if (!normalize) dot = 0;
  const double factor = inverse * static_cast<double>(scale);
  if (lift == 1 && (sizeof(A) == 8 || (factor > 1e-30 && factor < 1e30))) {
    const A narrow = static_cast<A>(factor);
    for (int64_t k = 0; k < d; ++k) grad_x[k] = static_cast<T>((g[k] - dot * u[k]) * narrow);
  } else {  // intermediate values may leave the range of A where the result does not
    for (int64_t k = 0; k < d; ++k)
      grad_x[k] = static_cast<T>(static_cast<A>(static_cast<double>(g[k] - dot * u[k]) * factor * lift * lift));
  }
}

// One embedding: its rows, padded to whole panels, and the gradient with respect to them.
template <typename A>
struct Side {
  int64_t n = 0, d = 0, rows = 0, width = 0, stride = 0;
  bool normalize = true;
  Buffer<A> unit, panels, gradient;
  Buffer<double> inverse_norm, lift;  // `lift` only for float64, whose squares may leave its range
  PairRows pairs;                     // in place of panels where the matrix instructions are used

  // What products that have these rows on their right read: panels, pairs, or nothing where there are no such products.
  enum class Right { kPanels, kPairs, kNone };

  // Only allocates; `fill` writes the rows.
  Side(int64_t n, int64_t d, bool normalize, Right right)
      : n(n), d(d), rows(padded(n)), width(padded(d)), normalize(normalize) {
    stride = width / kPanel % 2 ? width : width + kPanel;  // odd number of lines, see kTileRow
    unit = Buffer<A>(rows * stride);
    if (right == Right::kPairs) pairs = PairRows(rows, d);
    if (right == Right::kPanels) panels = Buffer<A>(rows * width);
    inverse_norm = Buffer<double>(rows);
    if (sizeof(A) == 8) lift = Buffer<double>(rows);
  }

  template <typename T>
  Side(const Source<T>& x, const uint8_t* used, int64_t n, int64_t d, bool normalize, Right right)
      : Side(n, d, normalize, right) {
    parallel_for(0, rows / kPanel, grain(kPanel * width), [&](int64_t b, int64_t e) { fill(x, used, b, e); });
  }

  // Fills the panels begin … end, of kPanel rows each.
  template <typename T>
  void fill(const Source<T>& x, const uint8_t* used, int64_t begin, int64_t end) {
    normalise_rows(x, used, normalize, unit.get(), panels.get(), inverse_norm.get(), lift.get(), n, d, width, stride,
                   begin * kPanel, end * kPanel);
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (!pairs) return;
      for (int64_t i = begin * kPanel; i < end * kPanel; ++i) {
        const bool takes_part = i < n && used[i];
        pairs.set_row(i, takes_part ? x.row(i, d) : nullptr, d, inverse_norm[i], normalize);
      }
      for (int64_t panel = begin; panel < end; ++panel) pairs.set_panel(panel);
    }
  }

  // Allocates the gradient, all zeros.
  void open_gradient() {
    gradient = Buffer<A>(rows * width, A(0));
    if (!pairs) return;
    pairs.allocate_pairs();
    parallel_for(0, pairs.groups(), grain(kPairDepth * width), [&](int64_t b, int64_t e) { pairs.open(b, e); });
  }

  // Gradients with respect to x of rows begin … end, from those of the unit rows at `from` [end - begin, width].
  template <typename T>
  void project_rows(const A* from, T* grad_x, double* pull, A scale, int64_t begin, int64_t end) const {
    project_leaf(from, unit.get() + begin * stride, inverse_norm.get() + begin,
                 lift.get() ? lift.get() + begin : nullptr, normalize, grad_x, pull, scale, d, width, stride,
                 end - begin);
  }

  // Gradient with respect to rows begin … end of x; returns Σ <gradient, unit row> over them.
  template <typename T>
  double project(T* grad_x, A scale, int64_t begin, int64_t end) const {
    const Buffer<double> pull(end - begin);
    parallel_for(0, end - begin, grain(width), [&](int64_t b, int64_t e) {
      project_rows(gradient.get() + (begin + b) * width, grad_x + b * d, pull.get() + b, scale, begin + b, begin + e);
    });
    double sum = 0;
    for (int64_t i = 0; i < end - begin; ++i) sum += pull[i];
    return sum;
  }

  const A* row(int64_t i) const { return unit.get() + i * stride; }

  static int64_t grain(int64_t work) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)); }

 private:
  template <typename T>
  MSACORE_SIMD static void project_leaf(const A* __restrict__ gradient, const A* __restrict__ unit,
                                        const double* __restrict__ inverse_norm, const double* __restrict__ lifts,
                                        bool normalize, T* __restrict__ grad_x, double* __restrict__ pull, A scale,
                                        int64_t d, int64_t width, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      project_row(gradient + i * width, unit + i * stride, inverse_norm[i], lifts ? lifts[i] : 1.0, normalize,
                  grad_x + i * d, pull[i], scale, d);
  }
};

}  // namespace msacore::contrastive::cpu
