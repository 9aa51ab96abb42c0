// Rank-N-Contrast on CUDA: an anchor's loss, and the factors of its gradient, from its distances. With the samples in
// order of their targets, the label gap falls from both ends towards the anchor, so the others with a gap of at least g
// are a prefix and a suffix: a sum over them is read off two scans from outside in, at places found by bisection. The
// gradient takes two more from inside out.
#pragma once
#include "rank_n_contrast/rank_n_contrast_kernels.cuh"

namespace msacore::rank_n_contrast::cuda {

constexpr int kScanItems = 4;  // of a thread
constexpr double kNoNumber = NAN;

// Up to this range of similarities exp(s - top) and the inverses of its sums are numbers of type A: an anchor's sums
// are then plain ones, in float64. Beyond, the scans carry logarithms.
template <typename A>
constexpr double kNarrow = sizeof(A) == 8 ? 300 : 60;

__device__ __forceinline__ double merge(double a, double b) { return a + b; }

// sum · exp(top)
struct LogSum {
  double top, sum;

  __device__ double logarithm() const { return sum > 0 || sum != sum ? top + log(sum) : -INFINITY; }
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

// What the scans of an anchor hold, as numbers that stand for sums of exponentials: the sums themselves …
template <typename A>
struct Sums {
  using Sum = double;
  static constexpr double kNothing = 0;
  double nearest, inverse_temperature;

  static __device__ Sum sum_of(double number) { return number; }
  static __device__ double number_of(const Sum& sum) { return sum; }
  static __device__ double add(double a, double b) { return a + b; }
  static __device__ double inverse(double number) { return 1 / number; }
  __device__ A below_top(A distance) const {
    return (distance - static_cast<A>(nearest)) * static_cast<A>(inverse_temperature);
  }
  __device__ double exponential(A distance) const { return static_cast<double>(exp(-below_top(distance))); }
  // exp(s) · number - 1
  __device__ double slope(A distance, double number) const { return exponential(distance) * number - 1; }
};

// … or their logarithms.
template <typename A>
struct Logarithms {
  using Sum = LogSum;
  static constexpr double kNothing = -INFINITY;
  double inverse_temperature;

  static __device__ Sum sum_of(double number) { return {number, 1}; }
  static __device__ double number_of(const Sum& sum) { return sum.logarithm(); }
  static __device__ double add(double a, double b) { return merge(sum_of(a), sum_of(b)).logarithm(); }
  static __device__ double inverse(double number) { return -number; }
  __device__ double exponential(A distance) const { return -static_cast<double>(distance) * inverse_temperature; }
  __device__ double slope(A distance, double number) const { return exp(exponential(distance) + number) - 1; }
};

// Sum of log(sum / exp(s)) over a thread's pairs; of plain sums a logarithm is taken for many factors at once.
template <typename A>
struct Loss {
  double sum = 0, product = 1;

  __device__ void add(const Logarithms<A>& of, A distance, double number) { sum += number - of.exponential(distance); }
  __device__ void add(const Sums<A>& of, A distance, double number) {
    sum += static_cast<double>(of.below_top(distance));
    product *= number;
    if (product < 1e-150 || product > 1e150) {
      sum += log(product);
      product = 1;
    }
  }
  __device__ double total() const { return sum + log(product); }
};

// numbers[j] ← number of the sum of value over the places before j and j itself, of the `count` places that go up
// (`rising`) or down from `begin` on; called by a block.
template <typename Kind, typename Value>
__device__ __forceinline__ void scan(int count, int begin, bool rising, Value value, double* __restrict__ numbers) {
  using S = typename Kind::Sum;
  MSACORE_SHARED(partial, S[kWarps]);
  S before = Kind::sum_of(Kind::kNothing);
  for (int start = 0; start < count; start += kThreads * kScanItems) {
    const int first = start + threadIdx.x * kScanItems;
    const auto place = [&](int k) { return rising ? begin + first + k : begin - first - k; };
    double values[kScanItems];
    S inclusive = Kind::sum_of(Kind::kNothing);
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      values[k] = first + k < count ? value(place(k)) : Kind::kNothing;
      inclusive = merge(inclusive, Kind::sum_of(values[k]));
    }
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const S other = shuffle_up(inclusive, step);
      if (lane_id() >= step) inclusive = merge(other, inclusive);
    }
    S running = shuffle_up(inclusive, 1);
    if (lane_id() == 0) running = Kind::sum_of(Kind::kNothing);
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
      running = merge(running, Kind::sum_of(values[k]));
      if (first + k < count) numbers[place(k)] = Kind::number_of(running);
    }
    before = of_warps;
  }
}

// The first place in begin … end where `is` holds; it holds from there on.
template <typename Is>
__device__ __forceinline__ int first_place(int begin, int end, Is is) {
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (is(middle)) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// The same where it is likely near `begin`, and near `end`: equal gaps are few more often than not.
template <typename Is>
__device__ __forceinline__ int first_place_after(int begin, int end, Is is) {
  int step = 1;
  while (begin + step <= end && !is(begin + step - 1)) {
    begin += step;
    step *= 2;
  }
  return first_place(begin, min(end, begin + step - 1), is);
}
template <typename Is>
__device__ __forceinline__ int first_place_before(int begin, int end, Is is) {
  int step = 1;
  while (end - step >= begin && is(end - step)) {
    end -= step;
    step *= 2;
  }
  return first_place(max(begin, end - step + 1), end, is);
}

// An anchor among the n unmasked samples, as a block sees it.
template <typename A, typename Target>
struct Anchor {
  using Y = acc_t<Target>;
  const Y* target;
  const A* distance;
  double *numbers, *denominator;  // scratch [n]
  Y own;
  int self, n;

  __device__ Y gap(int j) const { return static_cast<Y>(fabs(static_cast<Y>(static_cast<Target>(own - target[j])))); }

  // The number of the sum over all with at least the gap of j, where `numbers` holds scans from outside in.
  template <typename Kind>
  __device__ double outside(int j) const {
    const Y wanted = gap(j);
    const auto closer = [&](int k) { return gap(k) < wanted; };
    const auto as_far = [&](int k) { return gap(k) >= wanted; };
    const int left = j < self ? first_place_after(j + 1, self, closer) : first_place(0, self, closer);
    const int right = j > self ? first_place_before(self + 1, j, as_far) : first_place(self + 1, n, as_far);
    return Kind::add(left > 0 ? numbers[left - 1] : Kind::kNothing, right < n ? numbers[right] : Kind::kNothing);
  }
  // Over all with at most the gap of j, where `numbers` holds scans from inside out.
  template <typename Kind>
  __device__ double inside(int j) const {
    const Y wanted = gap(j);
    const auto as_close = [&](int k) { return gap(k) <= wanted; };
    const auto farther = [&](int k) { return gap(k) > wanted; };
    const int left = j < self ? first_place_before(0, j, as_close) : first_place(0, self, as_close);
    const int right = (j > self ? first_place_after(j + 1, n, farther) : first_place(self + 1, n, farther)) - 1;
    return Kind::add(left < self ? numbers[left] : Kind::kNothing, right > self ? numbers[right] : Kind::kNothing);
  }
  // This thread's share of the loss, or, with `Backward`, put(j, d(loss of the anchor) / ds_j).
  template <bool Backward, typename Kind, typename Put>
  __device__ double work(const Kind& kind, Put put) const {
    const auto exponential = [&](int j) { return kind.exponential(distance[j]); };
    const auto inverse = [&](int j) { return Kind::inverse(denominator[j]); };
#pragma unroll 1
    for (int side = 0; side < 2; ++side)
      scan<Kind>(side ? n - 1 - self : self, side ? n - 1 : 0, side == 0, exponential, numbers);
    __syncthreads();
    Loss<A> loss;
    for (int j = threadIdx.x; j < n; j += kThreads) {
      if (j == self) continue;
      const double number = outside<Kind>(j);
      if (Backward) {
        denominator[j] = number;
      } else {
        loss.add(kind, distance[j], number);
      }
    }
    if (!Backward) return loss.total();
    __syncthreads();
#pragma unroll 1
    for (int side = 0; side < 2; ++side)
      scan<Kind>(side ? n - 1 - self : self, side ? self + 1 : self - 1, side == 1, inverse, numbers);
    __syncthreads();
    for (int j = threadIdx.x; j < n; j += kThreads)
      if (j != self) put(j, kind.slope(distance[j], inside<Kind>(j)));
    return 0;
  }
};

// An anchor per block, of the strip that begins at `first`; target in order; scratch [2, padded] for each. Writes its
// loss or, with `Backward`, replaces its distances by the factors a_j with which e_self - e_j enters the gradient: 0
// for near pairs, whose factors go to the second half of the scratch.
template <bool Backward, typename A, typename Target>
__global__ void __launch_bounds__(kThreads, 2)
    anchor_kernel(const acc_t<Target>* __restrict__ target, const int64_t* __restrict__ unmasked, int64_t padded,
                  const __grid_constant__ Near near, int64_t first, double inverse_temperature,
                  const A* __restrict__ grad_out, A* __restrict__ distances, double* __restrict__ scratch,
                  double* __restrict__ losses) {
  const int self = static_cast<int>(first + blockIdx.x), n = static_cast<int>(*unmasked);
  A* const distance = distances + int64_t{blockIdx.x} * padded;
  double* const numbers = scratch + int64_t{blockIdx.x} * 2 * padded;
  const bool any = self < n && n > 1;
  const Anchor<A, Target> anchor{target, distance, numbers, numbers + padded, any ? target[self] : acc_t<Target>(0),
                                 self,   n};
  bool bad = false;
  A nearest = INFINITY, farthest = 0;
  for (int j = threadIdx.x; any && j < n; j += kThreads) {
    bad = bad || anchor.gap(j) != anchor.gap(j);
    if (j == self) continue;
    nearest = Min{}(nearest, distance[j]);
    farthest = Max{}(farthest, distance[j]);
  }
  bad = __syncthreads_or(bad);
  nearest = block_reduce(nearest, Min{}, A(INFINITY));
  farthest = block_reduce(farthest, Max{}, A(0));
  const double pairs = static_cast<double>(n) * static_cast<double>(n - 1);
  const double scale = Backward && any ? -static_cast<double>(*grad_out) / pairs * inverse_temperature : 0;
  const auto put = [&](int j, double slope) {
    const A apart = distance[j];
    const double factor = apart == A(0) ? 0 : scale * slope / static_cast<double>(apart);
    const bool is_near = near.holds(blockIdx.x, j);
    distance[j] = is_near ? A(0) : static_cast<A>(factor);
    if (is_near) anchor.denominator[j] = factor;
  };
  double loss = 0;
  if (any && !bad) {
    const double range = (static_cast<double>(farthest) - static_cast<double>(nearest)) * inverse_temperature;
    loss = range <= kNarrow<A>
               ? anchor.template work<Backward>(Sums<A>{static_cast<double>(nearest), inverse_temperature}, put)
               : anchor.template work<Backward>(Logarithms<A>{inverse_temperature}, put);
  }
  if (Backward) {
    for (int j = threadIdx.x; j < padded; j += kThreads)
      if (!any || bad || j >= n || j == self) distance[j] = static_cast<A>(any && bad && j < n ? kNoNumber : 0);
  } else {
    loss = block_sum(bad ? kNoNumber : loss);
    if (threadIdx.x == 0) losses[self] = loss;
  }
}

}  // namespace msacore::rank_n_contrast::cuda
