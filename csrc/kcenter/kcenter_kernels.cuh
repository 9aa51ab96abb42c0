// Comparing rows of the pool with centres on the device. A product of rows rounded to 16 bits, on tensor cores, rules
// out the pairs that cannot matter; float64 distances decide the rest. A block owns 64 rows and goes through the
// centres 64 at a time; pairs that need the exact distance are listed in shared memory and taken by groups of eight
// lanes. Minima are taken by integer atomics on ordered bits: no result depends on the order of threads.
#pragma once
#include <algorithm>

#include "core/round.h"
#include "cuda/tile_product.cuh"
#include "kcenter/kcenter_distance.cuh"

namespace msacore::kcenter::cuda {
using namespace msacore::cuda;

constexpr int kPairs = kTile * kTile;  // of a tile
constexpr int kStages = 3;             // of the product
// Dynamic shared memory of a block: the product's stages, or the distances of listed pairs.
constexpr size_t kProductBytes = std::max<size_t>(kTileBytes<Half, Half, float, true, true, kStages>, kPairs * 8);
constexpr double kRaise = 1 << 14;     // scales numbers below 2 to below Half's largest, far from its smallest
constexpr float kAbove = 1 + 2.4e-7f;  // covers the rounding of a double to float32

// A row rounded to Half: the squared norm of the rounded row, and how far from it the row itself may be.
struct Ball {
  float norm, radius;
};

// Rows shifted and scaled by a power of two (for cosine: scaled to one length), in Half: [count, width], width a
// multiple of 16 bytes; ball [count], padded to whole tiles.
struct Packed {
  Half* rows;
  Ball* ball;
  int64_t count, width;

  __device__ Matrix<Half> tile(int64_t i) const { return {rows + i * kTile * width, width, count - i * kTile, width}; }
};

// Bounds on the squared distance of two rounded rows.
struct Range {
  float low, high;
};

// Bounds from products of rounded rows. With a = ‖x̂‖² + ‖ĉ‖², the squared distance ‖x̂ - ĉ‖² is a - 2<x̂, ĉ> up to
// `slack` · a. Products of Half are exact in float32. Each of the d additions of a tensor core is taken to err by 2⁻²²
// of the largest magnitude that it meets (it truncates addends at 2⁻²³ of it, and the accumulator once more), which is
// at most ‖x̂‖ ‖ĉ‖ <= a / 2: together 2 d 2⁻²² a / 2. The norms, three operations on them and the comparison err by at
// most 2⁻²⁴ each of numbers up to 4 a; these errors and those of the float64 distances stay far below 16 · 2⁻²² a. By
// the triangle inequality the distance itself is ‖x̂ - ĉ‖ up to the sum of the radii. The radii are measured, so any
// rounding to Half is valid: a poor one only leaves more pairs to float64.
struct Filter {
  double scale;
  float slack;

  Filter(double scale, int64_t width) : scale(scale), slack(static_cast<float>(width + 16) * 0x1p-22f) {}

  // A distance as a length between packed rows. For rows of one length L, a cosine distance is the squared distance of
  // their ends / 2L².
  template <bool kCosine>
  __device__ float length(double distance) const {
    return static_cast<float>((kCosine ? sqrt(2 * distance) : distance * scale) * kRaise);
  }
  __device__ __forceinline__ Range square(const Ball& x, const Ball& c, float product) const {
    const float norms = x.norm + c.norm;
    return {norms * (1 - slack) - 2 * product, norms * (1 + slack) - 2 * product};
  }
};

// Where packed row i comes from: row rows[i] of values [samples, width], or row i where `rows` is null.
template <typename In>
struct Source {
  const In* values;
  const int64_t* rows;
  int64_t samples, width;

  __device__ const In* row(int64_t i) const { return values + (rows ? clamped(rows[i], samples) : i) * width; }
};

// A warp owns a row. shift [width]. For cosine, a row of zeros counts as perpendicular to all other rows; a row whose
// squared norm float64 cannot hold well is left to the exact distances.
template <bool kCosine, typename In>
__global__ void __launch_bounds__(kThreads, 4)
    pack_kernel(Source<In> from, const double* __restrict__ shift, double scale, Packed out) {
  constexpr double kLargest = 65504;
  for (int64_t i = grid_thread() / kWarp; i < out.count; i += grid_threads() / kWarp) {
    const In* const x = from.row(i);
    double factor = scale * kRaise, own = 0, largest = 0;
    bool usable = true;
    if constexpr (kCosine) {
      for (int64_t j = lane_id(); j < from.width; j += kWarp) {
        const double value = static_cast<double>(x[j]);
        own = fma(value, value, own);
        largest = fmax(largest, fabs(value));
      }
      own = warp_sum(own);
      largest = warp_max(largest);
      usable = own > 1e-290 && own < 1e300;
      factor = usable ? kRaise / sqrt(own) : 0;
    }
    double norm = 0, square = 0;
    for (int64_t j = lane_id(); j < out.width; j += kWarp) {
      Half rounded = 0.0f;
      if (usable && j < from.width) {
        double value = static_cast<double>(x[j]) * factor;
        if constexpr (!kCosine) value -= static_cast<double>(static_cast<float>(shift[j] * scale)) * kRaise;
        rounded = static_cast<Half>(static_cast<float>(fmin(fmax(value, -kLargest), kLargest)));
        const double kept = static_cast<double>(static_cast<float>(rounded));
        norm = fma(kept, kept, norm);
        square = fma(value - kept, value - kept, square);
      }
      out.rows[i * out.width + j] = rounded;
    }
    norm = usable ? warp_sum(norm) : kRaise * kRaise;
    const double radius = usable ? sqrt(warp_sum(square)) : largest == 0 ? 0 : INFINITY;
    if (lane_id() == 0) out.ball[i] = {static_cast<float>(norm), static_cast<float>(radius) * kAbove};
  }
}

// What a block compares: 64 rows of `from` with the packed centres.
template <typename T>
struct Comparison {
  Source<T> from;
  const double* centers;  // [centres, width]
  Packed x, c;
  Filter filter;
};

// The pairs of a tile that need the exact distance.
struct Listed {
  uint16_t pair[kPairs];  // row · 64 + centre
  int count;

  __device__ void add(int row, int center) { pair[atomicAdd(&count, 1)] = static_cast<uint16_t>(row * kTile + center); }
};

// Calls body(place in the list, row, distance) in one of the eight lanes that computed the distance.
template <bool kCosine, typename T, typename Body>
__device__ __forceinline__ void for_listed(const Comparison<T>& args, const Listed& listed, int64_t panel, int64_t tile,
                                           const Body& body) {
  for (int p = thread_in_block() / kGroup; p < listed.count; p += kTileThreads / kGroup) {
    const int row = listed.pair[p] / kTile;
    const double* const center = args.centers + (tile * kTile + listed.pair[p] % kTile) * args.from.width;
    const double found = group_distance<kCosine>(args.from.row(panel * kTile + row), center, args.from.width);
    if (lane_id() % kGroup == 0) body(p, row, found);
  }
}

// c ← products of a panel of rows with a tile of centres.
template <typename T>
__device__ __forceinline__ void multiply(const Comparison<T>& args, int64_t panel, int64_t tile, TileSums<float>& c) {
  clear(c);
  add_tile_product<true, true, kStages>(c, args.x.tile(panel), args.c.tile(tile), args.x.width);
}

// Calls body(across, i, column) for this thread's sums c[down][across][i] of one row: i is 2 · half or 2 · half + 1.
template <typename Body>
__device__ __forceinline__ void for_sums_of(int half, const Body& body) {
#pragma unroll
  for (int across = 0; across < 4; ++across)
#pragma unroll
    for (int i = 2 * half; i < 2 * half + 2; ++i) body(across, i, tile_column(across, i));
}

// Compares x.count rows with the centres from number start[i] on and updates the nearest centre: delta, owner ->
// delta_out, owner_out. Of equally near centres the smaller number wins; an owner of -1 gives way to any centre.
template <bool kCosine, typename T>
__global__ void __launch_bounds__(kTileThreads, 4)
    fold_kernel(const __grid_constant__ Comparison<T> args, const int64_t* __restrict__ start,
                const double* __restrict__ delta, const int64_t* __restrict__ owner, double* __restrict__ delta_out,
                int64_t* __restrict__ owner_out) {
  MSACORE_SHARED(listed, Listed);
  MSACORE_SHARED(best, unsigned long long[kTile]);
  MSACORE_SHARED(before, unsigned long long[kTile]);
  MSACORE_SHARED(nearest, unsigned long long[kTile]);  // number of the centre; -1 is the largest as unsigned
  MSACORE_SHARED(upper, float[2][kTile]);              // no length above it can be the smallest; one per half of a tile
  MSACORE_SHARED(first, int64_t[kTile]);
  unsigned long long* const distance = dynamic_shared<unsigned long long>();  // of the listed pairs, in ordered bits
  const int t = threadIdx.x, side = warp_id() % 2;
  const Filter& filter = args.filter;
  const auto limit = [&](int r) { return filter.template length<kCosine>(from_ordered_bits(best[r])) * kAbove; };
  for (int64_t panel = blockIdx.x; panel * kTile < args.x.count; panel += gridDim.x) {
    const int64_t begin = panel * kTile;
    int64_t own_first = args.c.count;
    if (t < kTile) {
      const int64_t i = begin + t;
      best[t] = before[t] = ordered_bits(i < args.x.count ? delta[i] : 0);
      nearest[t] = static_cast<unsigned long long>(i < args.x.count ? owner[i] : 0);
      upper[0][t] = upper[1][t] = limit(t);
      if (i < args.x.count) own_first = start[i] < 0 ? 0 : start[i];
      first[t] = own_first;
    }
    if (t == 0) listed.count = 0;
    const int tiles = static_cast<int>(ceil_div(args.c.count, kTile));
    const int64_t lowest = block_reduce(own_first, Min{}, args.c.count);
    for (int tile = static_cast<int>(lowest / kTile); tile < tiles; ++tile) {
      TileSums<float> c;
      multiply(args, panel, tile, c);
      const Ball* const centers = args.c.ball + int64_t{tile} * kTile;
      const int here = static_cast<int>(min(args.c.count - int64_t{tile} * kTile, int64_t{kTile}));
      const auto may_be_least = [&](const Range& square, float radii, float above) {
        const float reach = above + radii;
        return !(square.low > reach * reach);
      };
      unsigned near = 0;  // this thread's pairs that may be the least, by what its half of the tile knows
#pragma unroll
      for (int down = 0; down < 2; ++down)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = tile_row(down, 2 * half);
          const int from = static_cast<int>(min(max(first[r] - int64_t{tile} * kTile, int64_t{0}), int64_t{kTile}));
          const Ball own = args.x.ball[begin + r];
          const float above = upper[side][r];
          float least = above;
          for_sums_of(half, [&](int across, int i, int j) {
            if (j < from || j >= here) return;
            const float radii = own.radius + centers[j].radius;
            const Range square = filter.square(own, centers[j], c[down][across][i]);
            if (!may_be_least(square, radii, above)) return;
            near |= 1u << (down * 16 + across * 4 + i);
            least = fminf(least, (sqrtf(fmaxf(square.high, 0)) + radii) * kAbove);
          });
          least = warp_reduce<4>(least, Min{});
          __syncwarp();  // all lanes of the row have read what one of them replaces
          if (lane_id() % 4 == 0) upper[side][r] = least;
        }
      if (!__syncthreads_or(near != 0)) continue;
      if (near != 0) {
#pragma unroll
        for (int down = 0; down < 2; ++down)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int r = tile_row(down, 2 * half);
            const Ball own = args.x.ball[begin + r];
            const float above = fminf(upper[0][r], upper[1][r]);
            for_sums_of(half, [&](int across, int i, int j) {
              if (!(near >> (down * 16 + across * 4 + i) & 1)) return;
              const Range square = filter.square(own, centers[j], c[down][across][i]);
              if (may_be_least(square, own.radius + centers[j].radius, above)) listed.add(r, j);
            });
          }
      }
      __syncthreads();
      for_listed<kCosine>(args, listed, panel, tile, [&](int p, int r, double found) {
        distance[p] = ordered_bits(found);
        atomicMin(&best[r], distance[p]);
      });
      const int count = listed.count;
      __syncthreads();
      if (t < kTile && best[t] < before[t]) {
        before[t] = best[t];
        nearest[t] = ~0ull;
        upper[0][t] = upper[1][t] = fminf(fminf(upper[0][t], upper[1][t]), limit(t));
      }
      if (t == 0) listed.count = 0;
      __syncthreads();
      for (int p = t; p < count; p += kTileThreads) {
        const int r = listed.pair[p] / kTile;
        const auto center = static_cast<unsigned long long>(int64_t{tile} * kTile + listed.pair[p] % kTile);
        if (distance[p] == best[r]) atomicMin(&nearest[r], center);
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
__global__ void __launch_bounds__(kTileThreads, 4)
    count_kernel(const __grid_constant__ Comparison<T> args, double radius, int64_t* __restrict__ out) {
  MSACORE_SHARED(listed, Listed);
  MSACORE_SHARED(inside, int[kTile]);
  const int t = threadIdx.x;
  const float reach = args.filter.template length<kCosine>(radius);
  for (int64_t panel = blockIdx.x; panel * kTile < args.x.count; panel += gridDim.x) {
    const int64_t begin = panel * kTile;
    if (t < kTile) inside[t] = 0;
    if (t == 0) listed.count = 0;
    for (int64_t tile = 0; tile * kTile < args.c.count; ++tile) {
      TileSums<float> c;
      multiply(args, panel, tile, c);
#pragma unroll
      for (int down = 0; down < 2; ++down)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = tile_row(down, 2 * half);
          if (begin + r >= args.x.count) continue;
          const Ball own = args.x.ball[begin + r];
          int sure = 0;
          for_sums_of(half, [&](int across, int i, int j) {
            if (tile * kTile + j >= args.c.count) return;
            const Ball center = args.c.ball[tile * kTile + j];
            const Range square = args.filter.square(own, center, c[down][across][i]);
            const float radii = own.radius + center.radius, surely = reach - radii * kAbove, maybe = reach + radii;
            if (surely > 0 && square.high * kAbove <= surely * surely) {
              ++sure;
            } else if (!(square.low > maybe * maybe * kAbove)) {
              listed.add(r, j);
            }
          });
          if (sure > 0) atomicAdd(&inside[r], sure);
        }
      __syncthreads();
      for_listed<kCosine>(args, listed, panel, tile, [&](int, int r, double found) {
        if (found <= radius) atomicAdd(&inside[r], 1);
      });
      __syncthreads();
      if (t == 0) listed.count = 0;
    }
    __syncthreads();
    if (t < kTile && begin + t < args.x.count) out[begin + t] = inside[t];
    __syncthreads();
  }
}

}  // namespace msacore::kcenter::cuda
