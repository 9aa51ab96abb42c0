// An anchor of a contrastive loss on CUDA: statistics of its similarities, its loss, and what its gradients need.
// Exponents are to base 2.
#pragma once
#include <limits>

#include "common/device.cuh"

namespace msacore::contrastive {

__device__ __forceinline__ float power2(float x) { return exp2f(x); }
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

// A negative factor marks a row that takes no part.
__device__ __forceinline__ bool used(float factor) { return !(factor < 0); }
__device__ __forceinline__ bool used(double factor) { return !(factor < 0); }

// An only candidate has probability 1: loss and gradient are zero, exactly.
__device__ __forceinline__ bool is_choice(int64_t candidates, bool without_self) {
  return candidates - without_self != 1;
}

template <typename A>
constexpr A kNothing = -std::numeric_limits<A>::infinity();

// What an anchor knows of some of its candidates: largest exponent, Σ 2^(exponent - maximum), Σ weight, Σ weight ·
// similarity.
template <typename A>
struct Stats {
  A maximum, sum, total, positive;
};

template <typename A>
__device__ __forceinline__ void merge(Stats<A>& to, const Stats<A>& from) {
  const A maximum = Max{}(to.maximum, from.maximum), shift = maximum == kNothing<A> ? A(0) : maximum;
  to.sum = to.sum * power2(to.maximum - shift) + from.sum * power2(from.maximum - shift);
  to.maximum = maximum;
  to.total += from.total;
  to.positive += from.positive;
}

template <typename A>
__device__ __forceinline__ Stats<double> in_double(const Stats<A>& stats) {
  return {stats.maximum, stats.sum, stats.total, stats.positive};
}

// Statistics of `Count` pairs of each of the lanes that differ in the bits First … Last.
template <int First, int Last, int Count, typename A>
__device__ __forceinline__ Stats<A> stats_of(const A (&exponent)[Count], const A (&weight)[Count],
                                             const A (&similarity)[Count]) {
  const auto reduce = [](A value, auto op) {
#pragma unroll
    for (int step = Last; step >= First; step /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, step));
    return value;
  };
  Stats<A> stats{kNothing<A>, 0, 0, 0};
#pragma unroll
  for (int k = 0; k < Count; ++k) stats.maximum = Max{}(stats.maximum, exponent[k]);
  stats.maximum = reduce(stats.maximum, Max{});
  const A shift = stats.maximum == kNothing<A> ? A(0) : stats.maximum;
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    stats.sum += power2(exponent[k] - shift);
    stats.total += weight[k];
    stats.positive += weight[k] * similarity[k];
  }
  stats.sum = reduce(stats.sum, Sum{});
  stats.total = reduce(stats.total, Sum{});
  stats.positive = reduce(stats.positive, Sum{});
  return stats;
}

// Writes what the backward pass needs of anchor i to stats [3, n]; returns its loss. `scale`: of exponents.
template <typename A>
__device__ __forceinline__ double finish_anchor(const Stats<double>& all, bool choice, double scale, A* stats,
                                                int64_t n, int64_t i) {
  const bool kept = all.total != 0;
  const double positive = kept ? all.positive / all.total : 0;
  double loss = 0, log_sum_exp = 0;
  if (kept && choice) {
    const double log = log2(all.sum);
    log_sum_exp = (all.maximum + log) * 0.6931471805599453;
    loss = (all.maximum - scale * positive + log) * 0.6931471805599453;
  }
  stats[i] = static_cast<A>(log_sum_exp);
  stats[n + i] = static_cast<A>(positive);
  stats[2 * n + i] = static_cast<A>(all.total);
  return loss;
}

// Backward: what the loss of an anchor counts. Null pointers count as 0.
template <typename A>
struct LossGradient {
  const A *out, *term;  // `out`: one number, or [n] where `per_anchor`
  double number;        // beside them
  double weight, scale;
  bool mean, per_anchor;

  __device__ double of(int64_t i, int64_t anchors) const {
    double gradient = number;
    if (out) gradient += weight * static_cast<double>(out[per_anchor ? i : 0]);
    if (term) gradient += static_cast<double>(*term);
    if (mean) gradient /= static_cast<double>(anchors);
    return gradient * scale;
  }
};

// An anchor in the gradients of its similarities: weights of softmax and positives, logarithm (base 2) of the sum of
// exponentials, and the positives' mean similarity.
template <typename A>
struct AnchorGradient {
  A share, log, attract, positive;
};

// Of a row that is no anchor.
template <typename A>
__device__ __forceinline__ AnchorGradient<A> no_anchor() {
  return {0, -kNothing<A>, 0, 0};
}

// Of an anchor that counts and has a choice; `gradient` is that of its loss, stats [3, n] are of the forward pass.
template <typename A>
__device__ __forceinline__ AnchorGradient<A> anchor_gradient(const A* stats, int64_t n, int64_t i, double gradient) {
  return {static_cast<A>(gradient), static_cast<A>(stats[i] * 1.4426950408889634),
          static_cast<A>(gradient / stats[2 * n + i]), stats[n + i]};
}

// The gradient of the similarity of two rows that each may be the other's anchor.
template <typename A>
__device__ __forceinline__ A similarity_gradient(const AnchorGradient<A>& a, const AnchorGradient<A>& b, A exponent,
                                                 A weight) {
  return a.share * power2(exponent - a.log) + b.share * power2(exponent - b.log) - weight * (a.attract + b.attract);
}

}  // namespace msacore::contrastive
