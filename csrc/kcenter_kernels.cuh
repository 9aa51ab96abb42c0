// Rows of the pool against centres on the device. As on the CPU, float32 products rule out the pairs that cannot matter
// and float64 distances decide the rest. A block owns 64 rows and goes through the centres 64 at a time; pairs that
// need the exact distance are listed in shared memory and taken by groups of eight lanes. Minima are integer atomics on
// ordered bits: no result depends on the order of threads.
#pragma once
#include "kcenter_distance.cuh"

namespace msacore::kcenter {

constexpr int kTile = 64;              // rows, and centres, of a tile
constexpr int kDepth = 32;             // components of a step
constexpr int kSide = 4;               // of a thread's square of pairs
constexpr int kPairs = kTile * kTile;  // of a tile
constexpr float kTiny = 1e-30f;        // squares below this vanish in float32
constexpr float kAbove = 1 + 2.4e-7f;  // against rounding a double to float32

// Rows in float32, moved by a shift and scaled by a power of two (or to unit length): panels [⌈count / 64⌉, depth, 64],
// zeros beyond count and width; norm [⌈count / 64⌉ · 64], squared (0.5 for cosine).
struct Packed {
  float *panels, *norm;
  int64_t count, depth;

  __device__ const float* panel(int64_t i) const { return panels + i * depth * kTile; }
};

// factor · <x, c> below the sum of the norms is the squared distance (cosine distance) up to slack · that sum.
struct Filter {
  double scale;
  float slack;

  template <bool kCosine>
  __device__ static float factor() {
    return kCosine ? 1.0f : 2.0f;
  }
  // A distance in the filter's units.
  template <bool kCosine>
  __device__ double units(double distance) const {
    return kCosine ? distance : (distance * scale) * (distance * scale);
  }
};

// Where the values of packed rows come from: [samples, width], row `rows`[i] or (null) row i.
template <typename In>
struct Source {
  const In* values;
  const int64_t* rows;
  int64_t samples, width;

  __device__ const In* row(int64_t i) const { return values + (rows ? clamped(rows[i], samples) : i) * width; }
};

// A block owns a panel, a warp eight of its rows. shift [width]
template <bool kCosine, typename In>
__global__ void __launch_bounds__(kThreads, 4)
    pack_kernel(Source<In> from, const double* __restrict__ shift, double scale, Packed out) {
  using A = acc_t<In>;
  constexpr int kWarps = kThreads / kWarp, kMine = kTile / kWarps;
  MSACORE_SHARED(tile, float[kTile][kDepth + 1]);
  const int lane = lane_id();
  for (int64_t panel = blockIdx.x; panel * kTile < out.count; panel += gridDim.x) {
    double factor[kMine];
    float norm[kMine] = {};
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      const int64_t i = panel * kTile + warp_id() + m * kWarps;
      factor[m] = scale;
      if (!kCosine) continue;
      double sum = 0;
      for (int64_t j = lane; i < out.count && j < from.width; j += kWarp) {
        const double value = static_cast<double>(from.row(i)[j]);
        sum = fma(value, value, sum);
      }
      sum = warp_sum(sum);
      factor[m] = sum > 0 ? 1 / sqrt(sum) : 0;
    }
    for (int64_t k = 0; k < out.depth; k += kDepth) {
      const int64_t j = k + lane;
      __syncthreads();
#pragma unroll
      for (int m = 0; m < kMine; ++m) {
        const int r = warp_id() + m * kWarps;
        float value = 0;
        if (panel * kTile + r < out.count && j < from.width) {
          const In x = from.row(panel * kTile + r)[j];
          value = kCosine ? static_cast<float>(static_cast<double>(x) * factor[m])
                          : static_cast<float>(static_cast<A>(x) * static_cast<A>(scale) -
                                               static_cast<A>(static_cast<float>(shift[j] * scale)));
        }
        tile[r][lane] = value;
        norm[m] += value * value;
      }
      __syncthreads();
      float* const to = out.panels + (panel * out.depth + k) * kTile;
      for (int e = threadIdx.x; e < kTile * kDepth; e += kThreads) to[e] = tile[e % kTile][e / kTile];
    }
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      const float sum = kCosine ? 0.5f : warp_sum(norm[m]);
      if (lane == 0) out.norm[panel * kTile + warp_id() + m * kWarps] = sum;
    }
  }
}

// What a block keeps in shared memory.
struct Scratch {
  union {
    float tile[2][2][kDepth * kTile];     // two steps in flight, of rows and of centres
    unsigned long long distance[kPairs];  // of the listed pairs, in ordered bits
  };
  uint16_t pair[kPairs];  // row · 64 + centre
  int listed;
};

// dot[i][j] = <row 4·(thread / 16) + i, centre 4·(thread % 16) + j> of two panels
__device__ __forceinline__ void multiply(const float* __restrict__ rows, const float* __restrict__ centers,
                                         int64_t depth, Scratch& scratch, float (&dot)[kSide][kSide]) {
  constexpr int kSixteenths = kDepth * kTile / 4;
  const int t = threadIdx.x, row = t / (kTile / kSide) * kSide, center = t % (kTile / kSide) * kSide;
#pragma unroll
  for (int i = 0; i < kSide; ++i)
#pragma unroll
    for (int j = 0; j < kSide; ++j) dot[i][j] = 0;
  const auto fetch = [&](int64_t k) {
    const int stage = static_cast<int>(k / kDepth) % 2;
    for (int e = t; k < depth && e < kSixteenths; e += kThreads) {
      async_copy16(&scratch.tile[stage][0][e * 4], rows + k * kTile + e * 4);
      async_copy16(&scratch.tile[stage][1][e * 4], centers + k * kTile + e * 4);
    }
    async_commit();
  };
  fetch(0);
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int stage = static_cast<int>(k / kDepth) % 2;
    fetch(k + kDepth);
    async_wait<1>();
    __syncthreads();
#pragma unroll 8
    for (int s = 0; s < kDepth; ++s) {
      const auto a = load<kSide>(&scratch.tile[stage][0][s * kTile + row]);
      const auto b = load<kSide>(&scratch.tile[stage][1][s * kTile + center]);
#pragma unroll
      for (int i = 0; i < kSide; ++i)
#pragma unroll
        for (int j = 0; j < kSide; ++j) dot[i][j] += a.at[i] * b.at[j];
    }
    __syncthreads();
  }
}

// Which pairs a block compares: 64 of the rows `from` with the packed centres, numbered from `first`.
template <typename T>
struct Comparison {
  Source<T> from;
  const double* centers;  // [centres, width]
  Packed x, c;
  Filter filter;
};

// rows' nearest centre after centers[start …] came in, of x.count rows: delta, owner -> delta_out, owner_out. An equal
// distance goes to the smaller number; an owner of -1 gives way to any.
template <bool kCosine, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    fold_kernel(Comparison<T> args, const int64_t* __restrict__ start, const double* __restrict__ delta,
                const int64_t* __restrict__ owner, double* __restrict__ delta_out, int64_t* __restrict__ owner_out) {
  MSACORE_SHARED(scratch, Scratch);
  MSACORE_SHARED(best, unsigned long long[kTile]);
  MSACORE_SHARED(before, unsigned long long[kTile]);
  MSACORE_SHARED(nearest, unsigned long long[kTile]);  // number of the centre; -1 is the largest
  MSACORE_SHARED(upper, float[kTile]);                 // no distance above this can be the smallest
  MSACORE_SHARED(first, int64_t[kTile]);
  const int t = threadIdx.x, row = t / (kTile / kSide) * kSide, column = t % (kTile / kSide) * kSide;
  const Filter& filter = args.filter;
  const float factor = Filter::factor<kCosine>();
  const auto limit = [&](unsigned long long bits) {
    return static_cast<float>(filter.template units<kCosine>(from_ordered_bits(bits))) * kAbove + kTiny;
  };
  for (int64_t panel = blockIdx.x; panel * kTile < args.x.count; panel += gridDim.x) {
    const int64_t begin = panel * kTile;
    int64_t own_first = args.c.count;
    if (t < kTile) {
      const int64_t i = begin + t;
      best[t] = before[t] = ordered_bits(i < args.x.count ? delta[i] : 0);
      nearest[t] = static_cast<unsigned long long>(i < args.x.count ? owner[i] : 0);
      upper[t] = limit(best[t]);
      if (i < args.x.count) own_first = start[i] < 0 ? 0 : start[i];
      first[t] = own_first;
    }
    if (t == 0) scratch.listed = 0;
    const int64_t lowest = block_reduce(own_first, Min{}, args.c.count);
    for (int64_t tile = lowest / kTile; tile * kTile < args.c.count; ++tile) {
      float dot[kSide][kSide];
      multiply(args.x.panel(panel), args.c.panel(tile), args.c.depth, scratch, dot);
      const auto center_norm = load<kSide>(args.c.norm + tile * kTile + column);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        const int r = row + i;
        const float row_norm = args.x.norm[begin + r];
        const auto valid = [&](int j) {
          const int64_t center = tile * kTile + column + j;
          return begin + r < args.x.count && center >= first[r] && center < args.c.count;
        };
        float least = upper[r];
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          const float norms = row_norm + center_norm.at[j];
          const float above = norms * (1 + filter.slack) - factor * dot[i][j] + kTiny;
          if (valid(j) && above < least) least = above;
        }
        least = warp_reduce<kTile / kSide>(least, Min{});
        if (column == 0) upper[r] = least;
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          const float below = (row_norm + center_norm.at[j]) * (1 - filter.slack) - factor * dot[i][j];
          if (valid(j) && below <= least)
            scratch.pair[atomicAdd(&scratch.listed, 1)] = static_cast<uint16_t>(r * kTile + column + j);
        }
      }
      __syncthreads();
      const int listed = scratch.listed;
      if (listed == 0) continue;
      for (int p = t / kGroup; p < listed; p += kThreads / kGroup) {
        const int r = scratch.pair[p] / kTile;
        const int64_t center = tile * kTile + scratch.pair[p] % kTile;
        const double found =
            group_distance<kCosine>(args.from.row(begin + r), args.centers + center * args.from.width, args.from.width);
        if (t % kGroup == 0) {
          scratch.distance[p] = ordered_bits(found);
          atomicMin(&best[r], scratch.distance[p]);
        }
      }
      __syncthreads();
      if (t < kTile && best[t] < before[t]) {
        before[t] = best[t];
        nearest[t] = ~0ull;
        upper[t] = min(upper[t], limit(best[t]));
      }
      if (t == 0) scratch.listed = 0;
      __syncthreads();
      for (int p = t; p < listed; p += kThreads) {
        const int r = scratch.pair[p] / kTile;
        const auto center = static_cast<unsigned long long>(tile * kTile + scratch.pair[p] % kTile);
        if (scratch.distance[p] == best[r]) atomicMin(&nearest[r], center);
      }
      __syncthreads();
    }
    __syncthreads();
    if (t < kTile && begin + t < args.x.count) {
      delta_out[begin + t] = from_ordered_bits(best[t]);
      owner_out[begin + t] = static_cast<int64_t>(nearest[t]);
    }
    __syncthreads();
  }
}

// out [x.count] = how many centres lie within `radius` of a row
template <bool kCosine, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    count_kernel(Comparison<T> args, double radius, int64_t* __restrict__ out) {
  MSACORE_SHARED(scratch, Scratch);
  MSACORE_SHARED(inside, int[kTile]);
  const int t = threadIdx.x, row = t / (kTile / kSide) * kSide, column = t % (kTile / kSide) * kSide;
  const float factor = Filter::factor<kCosine>();
  const float reach = static_cast<float>(args.filter.template units<kCosine>(radius));
  for (int64_t panel = blockIdx.x; panel * kTile < args.x.count; panel += gridDim.x) {
    const int64_t begin = panel * kTile;
    if (t < kTile) inside[t] = 0;
    if (t == 0) scratch.listed = 0;
    for (int64_t tile = 0; tile * kTile < args.c.count; ++tile) {
      float dot[kSide][kSide];
      multiply(args.x.panel(panel), args.c.panel(tile), args.c.depth, scratch, dot);
      const auto center_norm = load<kSide>(args.c.norm + tile * kTile + column);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        const int r = row + i;
        int sure = 0;
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          if (begin + r >= args.x.count || tile * kTile + column + j >= args.c.count) continue;
          const float norms = args.x.norm[begin + r] + center_norm.at[j];
          const float above = norms * (1 + args.filter.slack) - factor * dot[i][j] + kTiny;
          const float below = norms * (1 - args.filter.slack) - factor * dot[i][j] - kTiny;
          if (above * kAbove <= reach) {
            ++sure;
          } else if (below <= reach * kAbove) {
            scratch.pair[atomicAdd(&scratch.listed, 1)] = static_cast<uint16_t>(r * kTile + column + j);
          }
        }
        if (sure > 0) atomicAdd(&inside[r], sure);
      }
      __syncthreads();
      const int listed = scratch.listed;
      for (int p = t / kGroup; p < listed; p += kThreads / kGroup) {
        const int r = scratch.pair[p] / kTile;
        const int64_t center = tile * kTile + scratch.pair[p] % kTile;
        const double found =
            group_distance<kCosine>(args.from.row(begin + r), args.centers + center * args.from.width, args.from.width);
        if (t % kGroup == 0 && found <= radius) atomicAdd(&inside[r], 1);
      }
      __syncthreads();
      if (t == 0) scratch.listed = 0;
    }
    __syncthreads();
    if (t < kTile && begin + t < args.x.count) out[begin + t] = inside[t];
    __syncthreads();
  }
}

}  // namespace msacore::kcenter
