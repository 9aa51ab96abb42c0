// The pass over R = act(W G + c): activation, mixing of the pairs, column means, and their gradients, row by row.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/round.h"
#include "cpu/exp.h"
#include "cpu/simd.h"
#include "matrix_fusion/matrix_fusion.h"

namespace msacore::matrix_fusion::cpu {
using namespace msacore::cpu;

constexpr int64_t kMaxStep = 256;  // columns, of all pairs, that are in the first-level cache together

// The rows of one sample: row i of pair p starts at data + offset[p] + i · stride and holds `width` columns.
template <typename A>
struct Rows {
  A* data;
  const int64_t* offset;
  int64_t stride, width;
  const bool* present;  // χ_p

  // Even steps over the columns, so that no step is much shorter than the others.
  MSACORE_INLINE int64_t step() const {
    const int64_t parts = std::max<int64_t>(1, (width + kMaxStep / 4) / (kMaxStep / 2));
    return std::max<int64_t>(1, ceil_div(width, parts));
  }
};

template <typename A>
struct Mix {
  const A *weight, *bias;  // [C, P], [C]
  int64_t pairs, channels;
};

// With σ the logistic function, gelu(x) = x/2 (1 + tanh u) = x σ(2u), u = sqrt(2/π) (x + 0.044715 x³). `gate` is σ,
// `slope` its derivative σ (1 - σ), from the exponential: 1 - σ would lose all digits where σ is near 1.
template <typename A>
struct GeluGate {
  A gate, slope;

  MSACORE_INLINE explicit GeluGate(A x) {
    const A two_u = A(1.5957691216057308) * (x + A(0.044715) * x * x * x);
    const A e = exp_of(-std::abs(two_u)), inverse = 1 / (1 + e);
    gate = (two_u < 0 ? e : A(1)) * inverse;
    slope = e * inverse * inverse;
  }
};

// Comparisons are written so that NaN passes through.
template <Activation kAct, typename A>
MSACORE_INLINE A activate(A x) {
  if constexpr (kAct == Activation::kRelu) return x < 0 ? A(0) : x;
  if constexpr (kAct == Activation::kGelu) return x * GeluGate<A>(x).gate;
  return x;
}

// grad · act'(x); for relu a selection, so that it vectorises.
template <Activation kAct, typename A>
MSACORE_INLINE A activation_backward(A grad, A x) {
  if constexpr (kAct == Activation::kRelu) return x <= 0 ? A(0) : grad;
  if constexpr (kAct == Activation::kGelu) {
    const GeluGate<A> sigma(x);
    const A square = x * x < 1000 ? x * x : A(1000);  // beyond, the slope is 0, and x² may be inf
    return grad * (sigma.gate + x * sigma.slope * A(1.5957691216057308) * (1 + A(3 * 0.044715) * square));
  }
  return grad;
}

// In double every 64 terms: the rows of a masked or linear sample are constant, and sums of equal terms all round in
// the same direction.
template <typename A>
MSACORE_INLINE double sum_of(const A* __restrict__ values, int64_t count) {
  double total = 0;
  for (int64_t j0 = 0; j0 < count; j0 += 64) {
    const int64_t end = std::min(count, j0 + 64);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = j0; j < end; ++j) sum += values[j];
    total += sum;
  }
  return total;
}

// s[0 … count) = Σ_p weight[c, p] · local[p] + bias[c] over the present pairs, before the activation.
template <typename A>
MSACORE_INLINE void mix_pairs(const Mix<A>& mix, int64_t c, const bool* present, const A* __restrict__ local,
                              int64_t count, A* __restrict__ s) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) s[j] = mix.bias[c];
  for (int64_t p = 0; p < mix.pairs; ++p) {
    if (!present[p]) continue;
    const A* __restrict__ r = local + p * kMaxStep;
    const A v = mix.weight[c * mix.pairs + p];
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) s[j] += v * r[j];
  }
}

// From pre-activations (without c) to the column means of χ_p R_p, pair_mean[p · mean_stride + i], and of S,
// fused_mean[c · mean_stride + i], for rows begin … end. `local` holds P · kMaxStep numbers.
template <Activation kAct, typename A>
MSACORE_SIMD void forward_rows(const Rows<const A> rows, const Mix<A> mix, const A* __restrict__ row_bias,
                               A* __restrict__ local, A* __restrict__ pair_mean, A* __restrict__ fused_mean,
                               int64_t mean_stride, int64_t begin, int64_t end) {
  const int64_t step = rows.step();
  const A share = A(1) / static_cast<A>(rows.width);
  for (int64_t i = begin; i < end; ++i) {
    const A bias = row_bias[i];
    for (int64_t p = 0; p < mix.pairs; ++p) pair_mean[p * mean_stride + i] = 0;
    for (int64_t c = 0; c < mix.channels; ++c) fused_mean[c * mean_stride + i] = 0;
    for (int64_t j0 = 0; j0 < rows.width; j0 += step) {
      const int64_t w = std::min(step, rows.width - j0);
      for (int64_t p = 0; p < mix.pairs; ++p) {
        if (!rows.present[p]) continue;
        const A* __restrict__ pre = rows.data + rows.offset[p] + i * rows.stride + j0;
        A* __restrict__ r = local + p * kMaxStep;
#pragma omp simd
        for (int64_t j = 0; j < w; ++j) r[j] = activate<kAct>(pre[j] + bias);
        pair_mean[p * mean_stride + i] += static_cast<A>(sum_of(r, w));
      }
      for (int64_t c = 0; c < mix.channels; ++c) {
        A s[kMaxStep];
        mix_pairs(mix, c, rows.present, local, w, s);
#pragma omp simd
        for (int64_t j = 0; j < w; ++j) s[j] = activate<kAct>(s[j]);
        fused_mean[c * mean_stride + i] += static_cast<A>(sum_of(s, w));
      }
    }
    for (int64_t p = 0; p < mix.pairs; ++p) pair_mean[p * mean_stride + i] *= share;
    for (int64_t c = 0; c < mix.channels; ++c) fused_mean[c * mean_stride + i] *= share;
  }
}

// Sums over samples, in double: many small terms.
struct SmallGrads {
  double *row_bias, *pair_weight, *pair_bias;  // [q], [C, P], [C]
};

// Replaces the pre-activations by their gradients and adds to the gradients of the small parameters. `grad_pair` and
// `grad_fused` are those of the means. `local` holds 2 P · kMaxStep numbers.
template <Activation kAct, typename A>
MSACORE_SIMD void backward_rows(const Rows<A> rows, const Mix<A> mix, const A* __restrict__ row_bias,
                                A* __restrict__ local, const A* __restrict__ grad_pair,
                                const A* __restrict__ grad_fused, int64_t mean_stride, const SmallGrads sums,
                                int64_t begin, int64_t end) {
  const int64_t step = rows.step();
  const A share = A(1) / static_cast<A>(rows.width);
  A* grad_local = local + mix.pairs * kMaxStep;
  for (int64_t i = begin; i < end; ++i) {
    const A bias = row_bias[i];
    for (int64_t j0 = 0; j0 < rows.width; j0 += step) {
      const int64_t w = std::min(step, rows.width - j0);
      for (int64_t p = 0; p < mix.pairs; ++p) {
        if (!rows.present[p]) continue;
        const A* __restrict__ pre = rows.data + rows.offset[p] + i * rows.stride + j0;
        A* __restrict__ r = local + p * kMaxStep;
        A* __restrict__ d = grad_local + p * kMaxStep;
        const A grad = share * grad_pair[p * mean_stride + i];
#pragma omp simd
        for (int64_t j = 0; j < w; ++j) {
          r[j] = activate<kAct>(pre[j] + bias);
          d[j] = grad;
        }
      }
      for (int64_t c = 0; c < mix.channels; ++c) {
        A s[kMaxStep];
        mix_pairs(mix, c, rows.present, local, w, s);
        const A grad = share * grad_fused[c * mean_stride + i];
#pragma omp simd
        for (int64_t j = 0; j < w; ++j) s[j] = activation_backward<kAct>(grad, s[j]);
        sums.pair_bias[c] += sum_of(s, w);
        for (int64_t p = 0; p < mix.pairs; ++p) {
          if (!rows.present[p]) continue;
          const A* __restrict__ r = local + p * kMaxStep;
          A* __restrict__ d = grad_local + p * kMaxStep;
          const A v = mix.weight[c * mix.pairs + p];
          A dot = 0;
#pragma omp simd reduction(+ : dot)
          for (int64_t j = 0; j < w; ++j) {
            dot += s[j] * r[j];
            d[j] += v * s[j];
          }
          sums.pair_weight[c * mix.pairs + p] += dot;
        }
      }
      for (int64_t p = 0; p < mix.pairs; ++p) {
        if (!rows.present[p]) continue;
        A* __restrict__ pre = rows.data + rows.offset[p] + i * rows.stride + j0;
        const A* __restrict__ d = grad_local + p * kMaxStep;
#pragma omp simd
        for (int64_t j = 0; j < w; ++j) pre[j] = activation_backward<kAct>(d[j], pre[j] + bias);
        sums.row_bias[i] += sum_of(pre, w);
      }
    }
    for (int64_t p = 0; p < mix.pairs; ++p) {
      A* __restrict__ row = rows.data + rows.offset[p] + i * rows.stride;
      if (!rows.present[p])
        for (int64_t j = 0; j < rows.width; ++j) row[j] = 0;
    }
  }
}

}  // namespace msacore::matrix_fusion::cpu
