// Rank-N-Contrast on CUDA: embeddings relative to a centre, in units of their spread, and the rows that are so far out
// that they must be kept apart. The findings stay on the device: kernels for float32 and for float64 distances are
// launched one after the other, and one of the two ends at once.
#pragma once
#include "cuda/rows.cuh"
#include "cuda/tile_product.cuh"

namespace msacore::rank_n_contrast::cuda {
using namespace msacore::cuda;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kMeanThreads = 1024, kMeanWarps = kMeanThreads / kWarp;
constexpr int kMedianThreads = 1024;

// A row is far where it lies more than this many times the median away. The contract's bound is 2^10 from the mean;
// from a row instead of the mean, distances are up to √2 times as long, and so is the median.
constexpr double kFar = 512;
// The mean is taken over the rows up to this many times the median away.
constexpr double kMeanReach = 8;

// What the device finds out about the samples.
struct State {
  int64_t unmasked;  // how many
  int64_t middle;    // the place of the row that norms are measured from
  double median, largest;
  double to_units;     // units of length are powers of two
  double temperature;  // for distances as they are
  double slope;        // 1 / temperature for distances in units
  int precise;         // whether distances are float64
};

__device__ __forceinline__ bool is_far(double norm, const State& state) { return !(norm <= kFar * state.median); }

// The samples in an order of places, in which masked ones come last.
template <typename T>
struct Ranked {
  const T* embeddings;    // [count, d], as they came
  int64_t count, padded;  // number of samples, and that padded to whole tiles
  int64_t d;
  int64_t* sample;  // [count]: which one is at a place
  double* norm;     // [count]: distance from `middle`
  double* mean;     // [d]: of the rows that are not far out, in units
  State* state;

  __device__ const T* embedding(int64_t place) const { return embeddings + sample[place] * d; }
  __device__ bool far(int64_t place) const { return is_far(norm[place], *state); }
};

// The embeddings of the samples as operands of products of type A.
template <typename T, typename A>
struct Pool {
  Ranked<T> ranked;
  int64_t depth;  // width of an embedding, padded with zeros to 16 bytes
  int64_t width;  // that and 16 bytes more, the first element 1, so that a product also sums the factors
  A* rows;        // [padded, width]: in units, less the mean; zeros where far, and from `unmasked` on
  A* square;      // [padded]: their squared norms, infinite where far

  __device__ bool is_idle() const { return ranked.state->precise != std::is_same_v<A, double>; }
};

__device__ __forceinline__ double group_max(double value, int lanes) {
  const unsigned group = (lanes == kWarp ? kAllLanes : (1u << lanes) - 1) << (lane_id() / lanes * lanes);
  for (int step = lanes / 2; step > 0; step /= 2) value = Max{}(value, __shfl_xor_sync(group, value, step));
  return value;
}

template <typename T>
__device__ __forceinline__ double as_double(T value) {
  return static_cast<double>(static_cast<acc_t<T>>(value));
}

// ‖x - y‖, by `lanes` neighbouring lanes. Squares of float32 numbers are in range of float64; a sum of float64 ones
// that is out of range is taken again, in units of the largest difference.
template <typename T>
__device__ __forceinline__ double distance_between(const T* x, const T* y, int64_t d, int lanes) {
  double sum = 0;
  for (int64_t c = lane_id() % lanes; c < d; c += lanes) {
    const double difference = as_double(x[c]) - as_double(y[c]);
    sum += difference * difference;
  }
  sum = group_sum(sum, lanes);
  if (!std::is_same_v<T, double> || (sum > 1e-280 && sum < 1e300) || sum != sum) return sqrt(sum);
  double largest = 0;
  for (int64_t c = lane_id() % lanes; c < d; c += lanes)
    largest = Max{}(largest, fabs(as_double(x[c]) - as_double(y[c])));
  largest = group_max(largest, lanes);
  if (largest == 0 || largest == INFINITY) return largest;
  sum = 0;
  for (int64_t c = lane_id() % lanes; c < d; c += lanes) {
    const double difference = (as_double(x[c]) - as_double(y[c])) / largest;
    sum += difference * difference;
  }
  return largest * sqrt(group_sum(sum, lanes));
}

// norm ← distance from the row at `middle`, a warp each; infinity for NaN.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) norm_kernel(const __grid_constant__ Ranked<T> ranked) {
  const int64_t n = ranked.state->unmasked, warps = int64_t{gridDim.x} * kWarps;
  for (int64_t p = int64_t{blockIdx.x} * kWarps + warp_id(); p < n; p += warps) {
    const double norm = distance_between(ranked.embedding(p), ranked.embedding(ranked.state->middle), ranked.d, kWarp);
    if (lane_id() == 0) ranked.norm[p] = norm == norm ? norm : INFINITY;
  }
}

// 2^exponent
__device__ __forceinline__ double power_of_two(int exponent) {
  return __longlong_as_double((static_cast<long long>(exponent) + 1023) << 52);
}

// One block: the median of the norms, 8 bits at a time, and where it stands. With `last` also what follows from the
// spread; the temperature is `learned` [] or, where that is null, `temperature`.
__global__ void __launch_bounds__(kMedianThreads, 1)
    median_kernel(const double* __restrict__ norm, State* __restrict__ state, bool last,
                  const double* __restrict__ learned, double temperature, bool always_precise) {
  constexpr int kDigits = 256;
  MSACORE_SHARED(counts, int[kDigits]);
  MSACORE_SHARED(digit, int);
  MSACORE_SHARED(before_digit, int);
  const int64_t n = state->unmasked;
  unsigned long long prefix = 0;
  int rank = static_cast<int>((n - 1) / 2);
  const auto bits_of = [&](int64_t i) { return static_cast<unsigned long long>(__double_as_longlong(norm[i])); };
  for (int shift = 56; shift >= 0 && n > 0; shift -= 8) {
    if (threadIdx.x < kDigits) counts[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kMedianThreads) {
      const unsigned long long bits = bits_of(i) >> shift;
      if (bits >> 8 == prefix) atomicAdd(&counts[bits & (kDigits - 1)], 1);
    }
    __syncthreads();
    const int own = threadIdx.x < kDigits ? counts[threadIdx.x] : 0;
    int total = 0;
    const int before = block_exclusive_scan(own, total);
    if (before <= rank && rank < before + own) {
      digit = static_cast<int>(threadIdx.x);
      before_digit = before;
    }
    __syncthreads();
    prefix = prefix << 8 | static_cast<unsigned>(digit);
    rank -= before_digit;
    __syncthreads();
  }
  int64_t middle = n;
  double largest = 0;
  for (int64_t i = threadIdx.x; i < n; i += kMedianThreads) {
    if (bits_of(i) == prefix) middle = Min{}(middle, i);
    largest = Max{}(largest, norm[i]);
  }
  middle = block_reduce(middle, Min{}, n);
  largest = block_reduce(largest, Max{}, 0.0);
  if (threadIdx.x > 0) return;
  const double median = __longlong_as_double(static_cast<long long>(prefix));
  state->median = median;
  if (!last) {
    state->middle = middle;
    return;
  }
  const double unit = median > 0 ? median : largest;
  const int exponent = static_cast<int>(__double_as_longlong(unit) >> 52) - 1023;
  const int kept = unit == 0 ? 0 : exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
  const double t = learned ? *learned : temperature;
  const double slope = power_of_two(kept) / t;
  state->largest = largest;
  state->to_units = power_of_two(-kept);
  state->temperature = t;
  state->slope = slope < 1e300 ? slope : 1e300;  // steeper ones have no finite result
  // Similarities, or slopes, beyond 2^100 could leave the range of float32.
  const bool steep = !((largest > 1 ? largest : 1) / t <= 0x1p100);
  state->precise = always_precise || steep || !(largest <= kFar * median);
}

// Grid [⌈d / 32⌉]: each lane owns a column, the warps share the rows.
template <typename T>
__global__ void __launch_bounds__(kMeanThreads, 1) embedding_mean_kernel(const __grid_constant__ Ranked<T> ranked) {
  MSACORE_SHARED(partial, double[kMeanWarps][kWarp + 1]);
  MSACORE_SHARED(counts, int[kMeanWarps]);
  const int64_t c = int64_t{blockIdx.x} * kWarp + lane_id(), n = ranked.state->unmasked;
  const double units = ranked.state->to_units, reach = kMeanReach * ranked.state->median;
  double sum = 0;
  int count = 0;
#pragma unroll 8
  for (int64_t p = warp_id(); p < n; p += kMeanWarps) {
    const bool counts_in = ranked.norm[p] <= reach;
    count += counts_in;
    if (counts_in && c < ranked.d) sum += as_double(ranked.embedding(p)[c]) * units;
  }
  partial[warp_id()][lane_id()] = sum;
  if (lane_id() == 0) counts[warp_id()] = count;
  __syncthreads();
  if (warp_id() > 0) return;
  for (int w = 1; w < kMeanWarps; ++w) {
    sum += partial[w][lane_id()];
    count += counts[w];
  }
  if (c < ranked.d) ranked.mean[c] = count > 0 ? sum / count : 0;
}

// The rows of the pool, a warp each.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, 4) rows_kernel(const __grid_constant__ Pool<T, A> pool) {
  if (pool.is_idle()) return;
  const Ranked<T>& ranked = pool.ranked;
  const int64_t n = ranked.state->unmasked, warps = int64_t{gridDim.x} * kWarps;
  const double units = ranked.state->to_units;
  for (int64_t p = int64_t{blockIdx.x} * kWarps + warp_id(); p < ranked.padded; p += warps) {
    A* const to = pool.rows + p * pool.width;
    const T* const from = p < n ? ranked.embedding(p) : nullptr;
    const bool far = std::is_same_v<A, double> && p < n && ranked.far(p);
    A square = 0;
    for (int64_t c = lane_id(); c < pool.width; c += kWarp) {
      A value = A(p < n && c == pool.depth);
      if (c < ranked.d && p < n && !far) value = static_cast<A>(as_double(from[c]) * units - ranked.mean[c]);
      to[c] = value;
      if (c < ranked.d) square += value * value;
    }
    square = warp_sum(square);
    if (lane_id() == 0) pool.square[p] = far ? static_cast<A>(INFINITY) : square;
  }
}

}  // namespace msacore::rank_n_contrast::cuda
