// An anchor of a contrastive loss on CUDA: statistics of its similarities, its loss, and what its gradients need.
// Exponents are to base 2.
#pragma once
#include <limits>

#include "cuda/device.cuh"

namespace msacore::contrastive::cuda {
using namespace msacore::cuda;

// Of float: one instruction, which gives 0 where exp2f gives less than the smallest normal number.
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

// A negative factor marks a row that takes no part.
__device__ __forceinline__ bool used(float factor) { return !(factor < 0); }
__device__ __forceinline__ bool used(double factor) { return !(factor < 0); }

// An only candidate has probability 1: loss and gradient are zero, exactly.
__device__ __forceinline__ bool is_choice(int64_t candidates, bool without_self) {
  return candidates - without_self != 1;
}

// While cosines of both signs stay in range of the exponent, `scale` can take the place of every maximum: one
// exponential serves a pair's row and its column.
__device__ __forceinline__ bool is_bounded(float scale) { return scale > 0 && 2 * scale < 120; }
__device__ __forceinline__ bool is_bounded(double scale) { return scale > 0 && 2 * scale < 1000; }

template <typename A>
constexpr A kNothing = -std::numeric_limits<A>::infinity();

// The larger number; a NaN loses, for it reaches the sum of exponentials anyway.
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ double operator()(double a, double b) const { return fmax(a, b); }
};

// Of some candidates of an anchor: largest exponent, Σ 2^(exponent - maximum).
template <typename A>
struct Softmax {
  A maximum, sum;
};

// Of some candidates of an anchor: Σ weight, Σ weight · similarity.
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
__device__ __forceinline__ void merge(Softmax<A>& to, const Softmax<A>& from) {
  const A maximum = Larger{}(to.maximum, from.maximum), shift = maximum == kNothing<A> ? A(0) : maximum;
  to.sum = to.sum * power2(to.maximum - shift) + from.sum * power2(from.maximum - shift);
  to.maximum = maximum;
}

template <typename A>
__device__ __forceinline__ void merge(Positives<A>& to, const Positives<A>& from) {
  to.total += from.total;
  to.similarity += from.similarity;
}

template <typename A>
__device__ __forceinline__ void merge(Stats<A>& to, const Stats<A>& from) {
  merge(to.softmax, from.softmax);
  merge(to.positives, from.positives);
}

template <typename A>
__device__ __forceinline__ Softmax<double> in_double(const Softmax<A>& softmax) {
  return {softmax.maximum, softmax.sum};
}
template <typename A>
__device__ __forceinline__ Positives<double> in_double(const Positives<A>& positives) {
  return {positives.total, positives.similarity};
}
template <typename A>
__device__ __forceinline__ Stats<double> in_double(const Stats<A>& stats) {
  return {in_double(stats.softmax), in_double(stats.positives)};
}

// Over the lanes that differ in the bits First … Last.
template <int First, int Last, typename A, typename Op>
__device__ __forceinline__ A lanes_reduce(A value, Op op) {
#pragma unroll
  for (int step = Last; step >= First; step /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// Of `Count` candidates of each of those lanes.
template <int First, int Last, int Count, typename A>
__device__ __forceinline__ Softmax<A> softmax_of(const A (&exponent)[Count]) {
  Softmax<A> softmax = no_softmax<A>();
#pragma unroll
  for (int k = 0; k < Count; ++k) softmax.maximum = Larger{}(softmax.maximum, exponent[k]);
  softmax.maximum = lanes_reduce<First, Last>(softmax.maximum, Larger{});
  const A shift = softmax.maximum == kNothing<A> ? A(0) : softmax.maximum;
#pragma unroll
  for (int k = 0; k < Count; ++k) softmax.sum += power2(exponent[k] - shift);
  softmax.sum = lanes_reduce<First, Last>(softmax.sum, Sum{});
  return softmax;
}
// The same, of powers 2^(exponent - maximum) for any `maximum` that these stay in range of.
template <int First, int Last, int Count, typename A>
__device__ __forceinline__ Softmax<A> sum_of_powers(const A (&power)[Count], A maximum) {
  A sum = 0;
#pragma unroll
  for (int k = 0; k < Count; ++k) sum += power[k];
  return {maximum, lanes_reduce<First, Last>(sum, Sum{})};
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

// Writes what the backward pass needs of anchor i to stats [4, n]; returns its loss. `positive`: mean similarity of the
// positives; `scale`: of exponents.
template <typename A>
__device__ __forceinline__ double finish_anchor(const Softmax<double>& all, double total, double positive, bool choice,
                                                double scale, A* stats, int64_t n, int64_t i) {
  double loss = 0, highest = 0, log = 0;
  if (total != 0 && choice) {
    log = log2(all.sum) * 0.6931471805599453;
    highest = all.maximum / scale;
    loss = (all.maximum - scale * positive) * 0.6931471805599453 + log;
  }
  stats[i] = static_cast<A>(highest);
  stats[n + i] = static_cast<A>(log);
  stats[2 * n + i] = static_cast<A>(positive);
  stats[3 * n + i] = static_cast<A>(total);
  return loss;
}

// Backward: what the loss of an anchor counts. Null pointers count as 0.
template <typename A>
struct LossGradient {
  const A *out, *term;  // `out`: one number, or [n] where `per_anchor`
  double weight, scale;
  bool mean, per_anchor;

  __device__ double of(int64_t i, int64_t anchors) const {
    double gradient = 0;
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

// Of an anchor that counts and has a choice; `gradient` is that of its loss, stats [4, n] are of the forward pass;
// `scale`: of exponents.
template <typename A>
__device__ __forceinline__ AnchorGradient<A> anchor_gradient(const A* stats, int64_t n, int64_t i, double scale,
                                                             double gradient) {
  return {static_cast<A>(gradient), static_cast<A>(stats[i] * scale + stats[n + i] * 1.4426950408889634),
          static_cast<A>(gradient / stats[3 * n + i]), stats[2 * n + i]};
}

// What the softmax counts in the gradient of the similarity of two rows that each may be the other's anchor.
template <typename A>
__device__ __forceinline__ A softmax_gradient(const AnchorGradient<A>& a, const AnchorGradient<A>& b, A exponent) {
  return a.share * power2(exponent - a.log) + b.share * power2(exponent - b.log);
}

}  // namespace msacore::contrastive::cuda
