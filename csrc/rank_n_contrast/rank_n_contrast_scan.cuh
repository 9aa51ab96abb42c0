// Rank-N-Contrast on CUDA: an anchor's loss, and the factors of its gradient, from its distances. With the others in
// the order of falling gaps, the sum over all samples with at least a sample's gap is read off a scan, at the end of
// its group of equal gaps. The gradient takes one more scan, from the last sample to the first.
#pragma once
#include "rank_n_contrast/rank_n_contrast_kernels.cuh"
#include "rank_n_contrast/rank_n_contrast_labels.cuh"

namespace msacore::rank_n_contrast::cuda {

constexpr int kScanItems = 4;  // per thread
constexpr double kNoNumber = NAN;

// Up to this range of similarities, exp(s - top) and the inverses of its sums are in range of type A: an anchor's sums
// are then plain numbers, in float64. Beyond it, the scans carry the exponent separately.
template <typename A>
constexpr double kNarrow = sizeof(A) == 8 ? 300 : 60;

__device__ __forceinline__ double merge(double a, double b) { return a + b; }

// sum · exp(top)
struct LogSum {
  double top, sum;
};

__device__ __forceinline__ LogSum merge(const LogSum& a, const LogSum& b) {
  if (b.top == -INFINITY) return a;
  if (a.top == -INFINITY) return b;
  const double rise = b.top - a.top;
  if (rise > 0) return {b.top, a.sum * exp(-rise) + b.sum};
  return {a.top, a.sum + b.sum * exp(rise)};
}

__device__ __forceinline__ double shuffle_up(double value, int step) { return __shfl_up_sync(kAllLanes, value, step); }
__device__ __forceinline__ LogSum shuffle_up(const LogSum& value, int step) {
  return {shuffle_up(value.top, step), shuffle_up(value.sum, step)};
}

// An array of sums of exponentials; the second numbers of LogSums lie `to_second` behind the first.
struct Numbers {
  double* at;
  int64_t to_second;

  __device__ void put(int i, double sum) const { at[i] = sum; }
  __device__ void put(int i, const LogSum& sum) const {
    at[i] = sum.top;
    at[i + to_second] = sum.sum;
  }
  __device__ void get(int i, double& sum) const { sum = at[i]; }
  __device__ void get(int i, LogSum& sum) const { sum = {at[i], at[i + to_second]}; }
};

// How an anchor's sums of exponentials are kept: plainly …
template <typename A>
struct Sums {
  using Sum = double;
  double nearest, inverse_temperature;

  static __device__ Sum nothing() { return 0; }
  static __device__ Sum inverse(Sum sum) { return 1 / sum; }
  __device__ A below_top(A distance) const {
    return (distance - static_cast<A>(nearest)) * static_cast<A>(inverse_temperature);
  }
  __device__ Sum exponential(A distance) const { return static_cast<double>(exp(-below_top(distance))); }
  // exp(s) · sum - 1
  __device__ double slope(A distance, Sum sum) const { return exponential(distance) * sum - 1; }
};

// … or with the exponent apart.
template <typename A>
struct LogSums {
  using Sum = LogSum;
  double nearest, inverse_temperature;

  static __device__ Sum nothing() { return {-INFINITY, 0}; }
  static __device__ Sum inverse(const Sum& sum) { return {-sum.top, 1 / sum.sum}; }
  __device__ double similarity(A distance) const {
    return (nearest - static_cast<double>(distance)) * inverse_temperature;
  }
  __device__ Sum exponential(A distance) const { return {similarity(distance), 1}; }
  __device__ double slope(A distance, const Sum& sum) const {
    return exp(similarity(distance) + sum.top) * sum.sum - 1;
  }
};

// Sum of log(sum / exp(s)) over a thread's pairs; one logarithm is taken for many factors.
template <typename A>
struct Loss {
  double sum = 0, product = 1;

  __device__ void add(const LogSums<A>& of, A distance, const LogSum& total) {
    sum += total.top - of.similarity(distance);
    multiply(total.sum);
  }
  __device__ void add(const Sums<A>& of, A distance, double total) {
    sum += static_cast<double>(of.below_top(distance));
    multiply(total);
  }
  __device__ void multiply(double factor) {
    product *= factor;
    if (product < 1e-150 || product > 1e150) {
      sum += log(product);
      product = 1;
    }
  }
  __device__ double total() const { return sum + log(product); }
};

// numbers[r] ← the sum of value(k) over the ranks k ≤ r or, with `falling`, k ≥ r, of `count` ranks; called by a block.
template <typename Kind, typename Value>
__device__ __forceinline__ void scan(int count, bool falling, Value value, const Numbers& numbers) {
  using S = typename Kind::Sum;
  MSACORE_SHARED(partial, S[kWarps]);
  S before = Kind::nothing();
  for (int start = 0; start < count; start += kThreads * kScanItems) {
    const int first = start + threadIdx.x * kScanItems;
    const auto rank = [&](int k) { return falling ? count - 1 - first - k : first + k; };
    S values[kScanItems];
    S inclusive = Kind::nothing();
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      values[k] = first + k < count ? value(rank(k)) : Kind::nothing();
      inclusive = merge(inclusive, values[k]);
    }
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const S other = shuffle_up(inclusive, step);
      if (lane_id() >= step) inclusive = merge(other, inclusive);
    }
    S running = shuffle_up(inclusive, 1);
    if (lane_id() == 0) running = Kind::nothing();
    __syncthreads();  // the readers of an earlier round are done
    if (lane_id() == kWarp - 1) partial[warp_id()] = inclusive;
    __syncthreads();
    S of_warps = before;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp_id()) running = merge(of_warps, running);
      of_warps = merge(of_warps, partial[w]);
    }
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      running = merge(running, values[k]);
      if (first + k < count) numbers.put(rank(k), running);
    }
    before = of_warps;
  }
}

// An anchor and the others, as a block sees them.
template <typename A>
struct Anchor {
  const A* distance;             // [others + 1], by place
  Order order;                   // of the others
  Numbers numbers, denominator;  // scratch memory [others], by rank
  int others;

  // The sum over all with at least the gap of rank r, where `numbers` holds the scan from the first rank.
  template <typename Kind>
  __device__ typename Kind::Sum outside(int r) const {
    const int group = order.group[r];
    typename Kind::Sum sum;
    numbers.get(first_place_after(r + 1, others, [&](int k) { return order.group[k] > group; }) - 1, sum);
    return sum;
  }
  // Over all with at most that gap, where `numbers` holds the scan from the last rank.
  template <typename Kind>
  __device__ typename Kind::Sum inside(int r) const {
    typename Kind::Sum sum;
    numbers.get(order.group[r], sum);
    return sum;
  }
  // This thread's share of the loss, or, with `Backward`, the sum of put(place, d(loss of the anchor) / ds).
  template <bool Backward, typename Kind, typename Put>
  __device__ double work(const Kind& kind, Put put) const {
    scan<Kind>(others, false, [&](int r) { return kind.exponential(distance[order.place[r]]); }, numbers);
    __syncthreads();
    Loss<A> loss;
    for (int r = threadIdx.x; r < others; r += kThreads) {
      const typename Kind::Sum sum = outside<Kind>(r);
      if (Backward) {
        denominator.put(r, Kind::inverse(sum));
      } else {
        loss.add(kind, distance[order.place[r]], sum);
      }
    }
    if (!Backward) return loss.total();
    __syncthreads();
    const auto inverse = [&](int r) {
      typename Kind::Sum sum;
      denominator.get(r, sum);
      return sum;
    };
    scan<Kind>(others, true, inverse, numbers);
    __syncthreads();
    double sum = 0;
    for (int r = threadIdx.x; r < others; r += kThreads) {
      const int place = order.place[r];
      sum += put(place, kind.slope(distance[place], inside<Kind>(r)));
    }
    return sum;
  }
};

// Scratch memory of a strip of anchors that begins at `first`. Anchors in [begin, end) take part.
template <typename A>
struct Strip {
  int64_t first, begin, end, padded;
  A* distances;     // [strip, padded], by place
  double* offsets;  // [strip, padded], of far anchors
  double* numbers;  // [strip, 4, padded]
  Order order;
  Near near;
};

// One anchor per block. Writes its loss or, with `Backward`, its Σ slope · distance, and then replaces its distances by
// the factors a_j of e_self - e_j in the gradient: 0 for near pairs, whose factors go to the second row of `numbers`.
template <bool Backward, typename A>
__global__ void __launch_bounds__(kThreads, 2)
    anchor_kernel(const State* __restrict__ state, const double* __restrict__ norm,
                  const __grid_constant__ Strip<A> strip, const double* __restrict__ grad_out,
                  double* __restrict__ losses) {
  if (state->precise != std::is_same_v<A, double>) return;
  const int self = static_cast<int>(strip.first + blockIdx.x), n = static_cast<int>(state->unmasked);
  const int64_t row = int64_t{blockIdx.x} * strip.padded;
  A* const distance = strip.distances + row;
  double *const numbers = strip.numbers + 4 * row, *const denominator = numbers + strip.padded;
  const bool any = self < n && n > 1 && self >= strip.begin && self < strip.end;
  const A* relative = distance;
  if constexpr (std::is_same_v<A, double>) {
    if (any && is_far(norm[self], *state)) relative = strip.offsets + row;
  }
  const Anchor<A> anchor{
      relative, strip.order.of(blockIdx.x), {numbers, 2 * strip.padded}, {denominator, 2 * strip.padded}, n - 1};
  const bool bad = any && anchor.order.group[0] < 0;
  A nearest = INFINITY, farthest = -nearest;
  for (int j = threadIdx.x; any && j < n; j += kThreads) {
    if (j == self) continue;
    nearest = Min{}(nearest, relative[j]);
    farthest = Max{}(farthest, relative[j]);
  }
  nearest = block_reduce(nearest, Min{}, A(INFINITY));
  farthest = block_reduce(farthest, Max{}, A(-INFINITY));
  const double top = static_cast<double>(nearest), slope_of_distance = state->slope;
  const double pairs = static_cast<double>(n) * static_cast<double>(n - 1);
  const double scale = Backward && any ? -*grad_out / pairs / state->temperature : 0;
  const auto put = [&](int j, double slope) -> double {
    const A apart = distance[j];
    // Slopes add up to 0, so that distances may be taken relative to the nearest.
    const double moved = slope * (static_cast<double>(relative[j]) - top);
    const double factor = apart == A(0) ? 0 : scale * slope / static_cast<double>(apart);
    const bool is_near = strip.near.holds(blockIdx.x, j);
    distance[j] = is_near ? A(0) : static_cast<A>(factor);
    if (is_near) denominator[j] = factor;
    return moved;
  };
  double loss = 0;
  if (any && !bad) {
    const double range = (static_cast<double>(farthest) - top) * slope_of_distance;
    loss = range <= kNarrow<A> ? anchor.template work<Backward>(Sums<A>{top, slope_of_distance}, put)
                               : anchor.template work<Backward>(LogSums<A>{top, slope_of_distance}, put);
  }
  if (Backward) {
    for (int j = threadIdx.x; j < strip.padded; j += kThreads) {
      if (!any || bad || j >= n || j == self) distance[j] = static_cast<A>(any && bad && j < n ? kNoNumber : 0);
      if (!any) denominator[j] = 0;
    }
  }
  loss = block_sum(bad ? kNoNumber : loss);
  if (threadIdx.x == 0) losses[self] = loss;
}

}  // namespace msacore::rank_n_contrast::cuda
