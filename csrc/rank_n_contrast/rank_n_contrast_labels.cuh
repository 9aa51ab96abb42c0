// Rank-N-Contrast on CUDA: the places of the samples, and the others by falling label gap as one anchor sees them.
#pragma once
#include "rank_n_contrast/rank_n_contrast_centre.cuh"

namespace msacore::rank_n_contrast::cuda {

// A sum of 64-bit gaps.
struct WideGap {
  uint64_t high, low;

  __device__ void add(uint64_t gap) {
    low += gap;
    high += low < gap;
  }
};
__device__ __forceinline__ bool operator<(const WideGap& a, const WideGap& b) {
  return a.high < b.high || (a.high == b.high && a.low < b.low);
}

// The type in which labels are subtracted, and that of their gaps. Gaps of integers are exact.
template <typename Target>
struct LabelTypes {
  using Value = acc_t<Target>;
  using Gap = acc_t<Target>;
  using SumOfGaps = acc_t<Target>;
};
template <>
struct LabelTypes<int64_t> {
  using Value = int64_t;
  using Gap = uint64_t;
  using SumOfGaps = WideGap;
};
template <typename Target>
using Value = typename LabelTypes<Target>::Value;

// |a - b| rounded as the dtype of the targets rounds it.
template <typename Target>
__device__ __forceinline__ typename LabelTypes<Target>::Gap gap_between(Value<Target> a, Value<Target> b) {
  if constexpr (std::is_same_v<Target, int64_t>) {
    const auto left = static_cast<uint64_t>(a), right = static_cast<uint64_t>(b);
    return a > b ? left - right : right - left;
  } else {
    return static_cast<Value<Target>>(fabs(static_cast<Value<Target>>(static_cast<Target>(a - b))));
  }
}

// Each block takes 256 samples and counts the samples before each of them. `targets` [count] or null, which sorts by
// the mask alone; target [count]: the targets in order.
template <typename Target>
__global__ void __launch_bounds__(kThreads, 4)
    rank_kernel(const Target* __restrict__ targets, const bool* __restrict__ mask, int64_t count,
                int64_t* __restrict__ sample, State* __restrict__ state, Value<Target>* __restrict__ target) {
  using Y = Value<Target>;
  enum Kind : int { kNumber, kNaN, kMasked };
  MSACORE_SHARED(value, Y[kThreads]);
  MSACORE_SHARED(kind, int[kThreads]);
  const auto kind_of = [&](int64_t i, Y& y) -> int {
    y = 0;
    if (mask && !mask[i]) return kMasked;
    if (targets) y = static_cast<Y>(targets[i]);
    return y == y ? kNumber : kNaN;
  };
  for (int64_t first = int64_t{blockIdx.x} * kThreads; first < count; first += grid_threads()) {
    const int64_t i = first + threadIdx.x;
    Y own = 0;
    const int own_kind = i < count ? kind_of(i, own) : kMasked;
    int64_t before = 0, unmasked = 0;
    for (int64_t start = 0; start < count; start += kThreads) {
      __syncthreads();
      const int64_t j = start + threadIdx.x;
      if (j < count) kind[threadIdx.x] = kind_of(j, value[threadIdx.x]);
      __syncthreads();
      const int size = static_cast<int>(min(count - start, int64_t{kThreads}));
      for (int k = 0; k < size; ++k) {
        const bool same = kind[k] == own_kind && (own_kind != kNumber || value[k] == own);
        const bool less = kind[k] < own_kind || (kind[k] == own_kind && own_kind == kNumber && value[k] < own);
        before += less || (same && start + k < i);
        unmasked += kind[k] != kMasked;
      }
    }
    if (i < count) {
      sample[before] = i;
      if (targets) target[before] = own;
    }
    if (i == 0) {
      state->unmasked = unmasked;
      state->middle = 0;
    }
  }
}

// The first rank in begin … end where `is` holds; it holds from there on.
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

// first_place for a result that is likely near `begin`, or near `end`: groups of equal gaps are usually small.
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

// The others of each anchor of a strip, in the order of falling gaps: the place of a rank, and the rank at which its
// group of equal gaps begins; `group` begins with -1 where a gap is NaN.
struct Order {
  int *place, *group;  // [strip, padded]
  int64_t padded;

  __device__ Order of(int64_t anchor) const { return {place + anchor * padded, group + anchor * padded, padded}; }
};

constexpr int kMergeItems = 8;  // per thread

// One label per sample, so that gaps fall by places from both ends towards the anchor: the two sides are merged. One
// block per anchor of the strip that begins at `first`. target [count]: the labels, by place.
template <typename Target>
__global__ void __launch_bounds__(kThreads, 4)
    line_order_kernel(const Value<Target>* __restrict__ target, const State* __restrict__ state, int64_t first,
                      const __grid_constant__ Order orders) {
  const int self = static_cast<int>(first + blockIdx.x), n = static_cast<int>(state->unmasked);
  if (self >= n) return;
  const Order order = orders.of(blockIdx.x);
  const Value<Target> own = target[self];
  const int below = self, above = n - 1 - self;  // how many are on either side
  const auto low_gap = [&](int i) { return gap_between<Target>(own, target[i]); };
  const auto high_gap = [&](int i) { return gap_between<Target>(own, target[n - 1 - i]); };
  bool bad = low_gap(self) != low_gap(self);
  for (int begin = threadIdx.x * kMergeItems; begin < n - 1; begin += kThreads * kMergeItems) {
    int i = first_place(max(0, begin - above), min(begin, below),
                        [&](int k) { return low_gap(k) < high_gap(begin - 1 - k); });
    int j = begin - i, group = 0;
    auto low = low_gap(i), high = high_gap(j);  // of the anchor itself where a side has ended
    auto last = low;
    for (int r = begin; r < min(begin + kMergeItems, n - 1); ++r) {
      const bool take_high = i >= below || (j < above && low < high);
      const auto gap = take_high ? high : low;
      bad = bad || gap != gap;
      if (r == begin) {
        group = first_place_before(0, i, [&](int k) { return low_gap(k) <= gap; }) +
                first_place_before(0, j, [&](int k) { return high_gap(k) <= gap; });
      } else if (gap != last) {
        group = r;
      }
      last = gap;
      order.place[r] = take_high ? n - 1 - j : i;
      order.group[r] = group;
      if (take_high) {
        high = high_gap(++j);
      } else {
        low = low_gap(++i);
      }
    }
  }
  bad = __syncthreads_or(bad);
  if (bad && threadIdx.x == 0) order.group[0] = -1;
}

// Several labels per sample: a stable merge sort of the others by gap. One block per anchor of the strip that begins at
// `first`. all_gaps: scratch memory [strip, padded], by place.
template <typename Target>
__global__ void __launch_bounds__(kThreads, 4)
    space_order_kernel(const Target* __restrict__ targets, int64_t labels, const int64_t* __restrict__ sample,
                       const State* __restrict__ state, int64_t first,
                       typename LabelTypes<Target>::SumOfGaps* __restrict__ all_gaps,
                       const __grid_constant__ Order orders) {
  using Sum = typename LabelTypes<Target>::SumOfGaps;
  const int self = static_cast<int>(first + blockIdx.x), n = static_cast<int>(state->unmasked), others = n - 1;
  if (self >= n) return;
  Sum* const gaps = all_gaps + int64_t{blockIdx.x} * orders.padded;
  const Order order = orders.of(blockIdx.x);
  int *from = order.place, *to = order.group;
  const Target* const own = targets + sample[self] * labels;
  bool bad = false;
  for (int j = threadIdx.x; j < n; j += kThreads) {
    const Target* const other = targets + sample[j] * labels;
    Sum gap{};
    for (int64_t c = 0; c < labels; ++c) {
      const auto one = gap_between<Target>(static_cast<Value<Target>>(own[c]), static_cast<Value<Target>>(other[c]));
      if constexpr (std::is_same_v<Target, int64_t>) {
        gap.add(one);
      } else {
        gap += one;
      }
    }
    if constexpr (!std::is_same_v<Target, int64_t>) {
      gap = static_cast<Sum>(static_cast<Target>(gap));
      bad = bad || gap != gap;
    }
    gaps[j] = gap;
  }
  bad = __syncthreads_or(bad);
  const auto before = [&](int a, int b) { return gaps[b] < gaps[a]; };
  for (int begin = threadIdx.x * kMergeItems; begin < others; begin += kThreads * kMergeItems) {
    const int end = min(begin + kMergeItems, others);
    for (int r = begin; r < end; ++r) {
      const int place = r < self ? r : r + 1;
      int at = r;
      for (; at > begin && before(place, from[at - 1]); --at) from[at] = from[at - 1];
      from[at] = place;
    }
  }
  for (int width = kMergeItems; width < others; width *= 2) {
    __syncthreads();
    for (int begin = threadIdx.x * kMergeItems; begin < others; begin += kThreads * kMergeItems) {
      const int start = begin / (2 * width) * (2 * width), end = min(begin + kMergeItems, others);
      const int *const a = from + start, *const b = a + width;
      const int size_a = min(width, others - start), size_b = max(0, min(width, others - start - width));
      const int diagonal = begin - start;
      int i = first_place(max(0, diagonal - size_b), min(diagonal, size_a),
                          [&](int k) { return before(b[diagonal - 1 - k], a[k]); });
      int j = diagonal - i;
      for (int r = begin; r < end; ++r) {
        const bool take_b = i >= size_a || (j < size_b && before(b[j], a[i]));
        to[r] = take_b ? b[j] : a[i];
        j += take_b;
        i += !take_b;
      }
    }
    int* const done = to;
    to = from;
    from = done;
  }
  __syncthreads();
  for (int r = threadIdx.x; r < others && from != order.place; r += kThreads) order.place[r] = from[r];
  __syncthreads();
  for (int r = threadIdx.x; r < others; r += kThreads)
    order.group[r] = first_place(0, r, [&](int k) { return !before(order.place[k], order.place[r]); });
  __syncthreads();
  if (bad && threadIdx.x == 0) order.group[0] = -1;
}

}  // namespace msacore::rank_n_contrast::cuda
