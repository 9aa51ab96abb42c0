// An anchor of a contrastive loss on CUDA: statistics of its similarities, its loss, and what its gradients need.
// Exponents are to base 2. The highest similarity is subtracted before the scaling: small temperatures make scaled
// similarities so large that their differences would be rounding errors.
#pragma once
#include <limits>

#include "cuda/device.cuh"

namespace msacore::contrastive::cuda {
using namespace msacore::cuda;

// 2^x. For float this is one instruction, which gives 0 where exp2f gives less than the smallest normal number.
__device__ __forceinline__ float power2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ double power2(double x) { return exp2(x); }

// A scalar of any floating dtype on the device, or a number.
struct Temperature {
  enum Kind : int { kNumber, kFloat, kDouble, kHalf, kBFloat16 };
  const void* at;
  Kind kind;
  double number;

  __device__ double value() const {
    switch (kind) {
      case kFloat:
        return *static_cast<const float*>(at);
      case kDouble:
        return *static_cast<const double*>(at);
      case kHalf:
        return static_cast<float>(*static_cast<const Half*>(at));
      case kBFloat16:
        return static_cast<float>(*static_cast<const BFloat16*>(at));
      default:
        return number;
    }
  }
  template <typename A>
  __device__ A scale() const {
    return static_cast<A>(1.4426950408889634 / value());
  }
};

// 2^exponent in two factors, because the power itself may be out of range.
template <typename A>
struct TwoPowers {
  A low, high;
  int exponent;

  __device__ A times(A x) const { return x * low * high; }
};
template <typename A = double>
__device__ __forceinline__ TwoPowers<A> two_powers(int exponent) {
  const auto power = [](int e) { return static_cast<A>(ldexp(1.0, e)); };
  return {power(exponent / 2), power(exponent - exponent / 2), exponent};
}
// The power of two that brings `x` > 0 into [1/2, 1); for 0 it is 1.
__device__ __forceinline__ TwoPowers<double> inverse_power(double x) {
  int exponent = 0;
  frexp(x, &exponent);
  return two_powers(-exponent);
}

// 1 / |x| = mantissa · 2^exponent, the mantissa in [1/2, 1): the number itself may be out of range. A mantissa of 0
// marks a row without gradient; rows that are not normalised have 1.
template <typename A>
struct InverseNorm {
  A mantissa;
  int exponent;
};
constexpr double kLargest = std::numeric_limits<double>::max();

// 1 / |x| from the square of |x · 2^shrunk|.
__device__ __forceinline__ InverseNorm<double> inverse_root(double square, int shrunk) {
  if (square == 0) return {0, 0};
  if (!(square <= kLargest)) return {NAN, 0};
  int exponent = 0;
  const double mantissa = frexp(1 / sqrt(square), &exponent);
  return {mantissa, exponent + shrunk};
}

// A negative factor marks a row that takes no part.
__device__ __forceinline__ bool used(float factor) { return !(factor < 0); }
__device__ __forceinline__ bool used(double factor) { return !(factor < 0); }

// A single candidate has probability 1: loss and gradient are exactly zero.
__device__ __forceinline__ bool is_choice(int64_t candidates, bool without_self) {
  return candidates - without_self != 1;
}

// While cosines of both signs stay in range of the exponent, `scale` can take the place of every maximum: one
// exponential serves a pair's row and its column.
__device__ __forceinline__ bool is_bounded(float scale) { return scale > 0 && 2 * scale < 120; }
__device__ __forceinline__ bool is_bounded(double scale) { return scale > 0 && 2 * scale < 1000; }

template <typename A>
constexpr A kNothing = -std::numeric_limits<A>::infinity();

// The larger number; a NaN loses, because it reaches the sum of exponentials anyway.
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ double operator()(double a, double b) const { return fmax(a, b); }
};

// Partial softmax over a subset of an anchor's candidates: highest similarity, Σ 2^((similarity - highest) · scale).
template <typename A>
struct Softmax {
  A highest, sum;
};

// Partial sums over a subset of an anchor's candidates: Σ weight, Σ weight · similarity.
template <typename A>
struct Positives {
  A total, similarity;

  __device__ A mean() const { return total != 0 ? similarity / total : A(0); }
};

template <typename A>
struct Stats {
  Softmax<A> softmax;
  Positives<A> positives;
};

template <typename A>
__device__ __forceinline__ Softmax<A> no_softmax() {
  return {kNothing<A>, 0};
}
template <typename A>
__device__ __forceinline__ Stats<A> no_stats() {
  return {no_softmax<A>(), {0, 0}};
}

template <typename A>
__device__ __forceinline__ void merge(Softmax<A>& to, const Softmax<A>& from, A scale) {
  const A highest = Larger{}(to.highest, from.highest), base = highest == kNothing<A> ? A(0) : highest;
  to.sum = to.sum * power2((to.highest - base) * scale) + from.sum * power2((from.highest - base) * scale);
  to.highest = highest;
}

template <typename A>
__device__ __forceinline__ void merge(Positives<A>& to, const Positives<A>& from) {
  to.total += from.total;
  to.similarity += from.similarity;
}

template <typename A>
__device__ __forceinline__ void merge(Stats<A>& to, const Stats<A>& from, A scale) {
  merge(to.softmax, from.softmax, scale);
  merge(to.positives, from.positives);
}

template <typename A>
__device__ __forceinline__ Softmax<double> in_double(const Softmax<A>& softmax) {
  return {softmax.highest, softmax.sum};
}
template <typename A>
__device__ __forceinline__ Positives<double> in_double(const Positives<A>& positives) {
  return {positives.total, positives.similarity};
}
template <typename A>
__device__ __forceinline__ Stats<double> in_double(const Stats<A>& stats) {
  return {in_double(stats.softmax), in_double(stats.positives)};
}

// Reduces over the lanes whose indices differ in the bits First … Last.
template <int First, int Last, typename A, typename Op>
__device__ __forceinline__ A lanes_reduce(A value, Op op) {
#pragma unroll
  for (int step = Last; step >= First; step /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// Softmax over `Count` candidates of each lane, reduced as in lanes_reduce; kNothing marks a candidate that takes no
// part.
template <int First, int Last, int Count, typename A>
__device__ __forceinline__ Softmax<A> softmax_of(const A (&similarity)[Count], A scale) {
  Softmax<A> softmax = no_softmax<A>();
#pragma unroll
  for (int k = 0; k < Count; ++k) softmax.highest = Larger{}(softmax.highest, similarity[k]);
  softmax.highest = lanes_reduce<First, Last>(softmax.highest, Larger{});
  const A base = softmax.highest == kNothing<A> ? A(0) : softmax.highest;
#pragma unroll
  for (int k = 0; k < Count; ++k) softmax.sum += power2((similarity[k] - base) * scale);
  softmax.sum = lanes_reduce<First, Last>(softmax.sum, Sum{});
  return softmax;
}
// The same from powers 2^((similarity - 1) · scale), which stay in range.
template <int First, int Last, int Count, typename A>
__device__ __forceinline__ Softmax<A> sum_of_powers(const A (&power)[Count]) {
  A sum = 0;
#pragma unroll
  for (int k = 0; k < Count; ++k) sum += power[k];
  return {A(1), lanes_reduce<First, Last>(sum, Sum{})};
}
template <int First, int Last, int Count, typename A>
__device__ __forceinline__ Positives<A> positives_of(const A (&weight)[Count], const A (&similarity)[Count]) {
  Positives<A> positives{0, 0};
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    positives.total += weight[k];
    positives.similarity += weight[k] * similarity[k];
  }
  positives.total = lanes_reduce<First, Last>(positives.total, Sum{});
  positives.similarity = lanes_reduce<First, Last>(positives.similarity, Sum{});
  return positives;
}

// Which candidates an anchor's denominator holds: all; for each positive, itself and the candidates that are not
// positive; only those that are not positive.
enum class Denominator : uint8_t { kAll, kNegatives, kDecoupled };

// What the forward pass keeps of an anchor, each number in an array of its own: highest similarity of the denominator,
// natural logarithm of its sum relative to that (-inf where it is empty), mean similarity of the positives (kNegatives:
// the loss), their total weight (0: the anchor dropped out), and with kNegatives alone Σ weight · share of the
// negatives in the denominator, divided by the total weight.
enum AnchorStat : int { kHighest, kLog, kPositive, kTotal, kRest };
constexpr int kAnchorStats = 4;

constexpr double kLn2 = 0.6931471805599453, kLog2E = 1.4426950408889634;

// Writes what the backward pass needs of anchor i to stats [4, n]; returns its loss, zero where it drops out. `total`
// and `positive`: weight and mean similarity of the positives; `choice`: false where the loss is certainly zero;
// `scale`: that of exponents.
template <typename A>
__device__ __forceinline__ double finish_anchor(Softmax<double> all, double total, double positive, bool choice,
                                                double scale, A* stats, int64_t n, int64_t i) {
  double loss = 0;
  if (all.highest == kNothing<double>) all.highest = 0;
  const double log = log2(all.sum) * kLn2;
  if (total != 0 && choice) loss = (all.highest - positive) * scale * kLn2 + log;
  stats[kHighest * n + i] = static_cast<A>(all.highest);
  stats[kLog * n + i] = static_cast<A>(log);
  stats[kPositive * n + i] = static_cast<A>(positive);
  stats[kTotal * n + i] = static_cast<A>(total);
  return loss;
}

// The gradient of an anchor's loss: that of the reduced loss or, with `per_anchor`, its own. It is divided by the
// number of anchors where the loss is a mean, and by the temperature, because similarities are those before the
// division by it.
template <typename A>
struct LossGradient {
  const A *out, *term;  // `out`: one number, or [n] where `per_anchor`
  const A* column_out;  // the same for columns as anchors
  double weight, scale;
  bool mean, per_anchor, per_column;

  __device__ double of(int64_t i, int64_t anchors, const Temperature& temperature, bool column = false) const {
    double gradient = 0;
    const A* const from = column ? column_out : out;
    if (from) gradient += weight * static_cast<double>(from[(column ? per_column : per_anchor) ? i : 0]);
    if (term) gradient += static_cast<double>(*term);
    if (mean) gradient /= static_cast<double>(anchors);
    return gradient * scale / temperature.value();
  }
};

// An anchor in the gradients of its similarities: the weight of its softmax, the highest similarity and the logarithm
// (base 2) that exponents are relative to, the weight of its positives, and their mean similarity (kNegatives: the
// loss).
template <typename A>
struct AnchorGradient {
  A softmax_weight, highest, log, attract, positive;

  // The exponent of a candidate, relative to that of the denominator.
  __device__ A exponent(A similarity, A scale) const { return (similarity - highest) * scale - log; }
};

// For a row that is not an anchor.
template <typename A>
__device__ __forceinline__ AnchorGradient<A> no_anchor() {
  return {0, 0, -kNothing<A>, 0, 0};
}

// For an anchor that takes part; `gradient` is that of its loss, stats [4 or 5, n] come from the forward pass.
template <typename A>
__device__ __forceinline__ AnchorGradient<A> anchor_gradient(const A* stats, int64_t n, int64_t i, double gradient,
                                                             Denominator denominator = Denominator::kAll) {
  const double rest = denominator == Denominator::kNegatives ? static_cast<double>(stats[kRest * n + i]) : 1;
  return {static_cast<A>(gradient * rest), stats[kHighest * n + i], static_cast<A>(stats[kLog * n + i] * kLog2E),
          static_cast<A>(gradient / stats[kTotal * n + i]), stats[kPositive * n + i]};
}

// Softmax probability of a candidate in an anchor's denominator.
template <typename A>
__device__ __forceinline__ A probability(const AnchorGradient<A>& anchor, A similarity, A scale) {
  return power2(anchor.exponent(similarity, scale));
}

// A positive against a sum that excludes it, where the exponent is relative to that of the sum: the softmax weight of
// the sum among the two, and the loss log(1 + sum / exponential).
template <typename A>
__device__ __forceinline__ A rest_of(A exponent) {
  return 1 / (1 + power2(exponent));
}
template <typename A>
__device__ __forceinline__ A loss_against_rest(A exponent) {
  const A small = static_cast<A>(log1p(power2(exponent > 0 ? -exponent : exponent)));
  return exponent > 0 ? small : small - exponent * static_cast<A>(kLn2);
}

// Adds the pair's term of Σ gradient · (similarity - highest of the anchor) to `slope`. The gradients of an anchor add
// up to zero, so this is Σ gradient · similarity, but of small differences.
template <typename A>
__device__ __forceinline__ A relative(A gradient, const AnchorGradient<A>& anchor, A similarity, A& slope) {
  slope += gradient * (similarity - anchor.highest);
  return gradient;
}

// The softmax's part of the gradient of the similarity of two rows, each of which may be the other's anchor.
template <typename A>
__device__ __forceinline__ A softmax_gradient(const AnchorGradient<A>& a, const AnchorGradient<A>& b, A similarity,
                                              A scale, A& slope) {
  return relative(a.softmax_weight * probability(a, similarity, scale), a, similarity, slope) +
         relative(b.softmax_weight * probability(b, similarity, scale), b, similarity, slope);
}

}  // namespace msacore::contrastive::cuda
