// The backward pass of InfoNCE on CUDA: gradients of a strip of similarities, their products with the rows, and the
// way back through the normalisation.
#pragma once
#include "contrastive_kernels.cuh"

namespace msacore::contrastive {

// Gradients of similarities in memory: bfloat16 where the rows are, so that both products run at full speed; float32
// for float16, whose range would not do.
template <typename T>
using gradient_t = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, acc_t<T>>;

// Weights of softmax and positives in the gradient, per row of a tile.
template <typename A>
struct TileGradient {
  A share[kTile], log[kTile], attract[kTile], positive[kTile];
};

template <typename T>
__device__ __forceinline__ void load_tile_gradient(TileGradient<acc_t<T>>& tile, const Problem<T>& problem,
                                                   const Side<T>& own, const Side<T>& other,
                                                   const acc_t<T>* __restrict__ grad_out, int64_t first, int r) {
  using A = acc_t<T>;
  const int64_t i = first + r;
  tile.share[r] = tile.attract[r] = tile.positive[r] = 0;
  tile.log[r] = -kNothing<A>;
  if (i >= own.n || !own.stats || own.stats[2 * own.n + i] == A(0) || !problem.choice(other, i)) return;
  double gradient = problem.per_anchor ? grad_out[i] : grad_out[0];
  if (problem.both) gradient /= 2;
  if (problem.mean) gradient /= static_cast<double>(own.counts[1]);
  tile.share[r] = static_cast<A>(gradient);
  tile.log[r] = static_cast<A>(own.stats[i] * 1.4426950408889634);
  tile.attract[r] = static_cast<A>(gradient / own.stats[2 * own.n + i]);
  tile.positive[r] = own.stats[own.n + i];
}

// Grid as for statistics_kernel. Writes the strip's gradients of the plain products of `unit` rows [strip, b.rows],
// those of the weights, and per tile Σ gradient · similarity.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 3)
    gradient_kernel(const __grid_constant__ Problem<T> problem, int64_t first, const acc_t<T>* __restrict__ grad_out,
                    gradient_t<T>* __restrict__ strip, T* __restrict__ grad_weights, double* __restrict__ slopes) {
  using A = acc_t<T>;
  MSACORE_SHARED(a, TileSide<A>);
  MSACORE_SHARED(b, TileSide<A>);
  MSACORE_SHARED(rows, TileGradient<A>);
  MSACORE_SHARED(columns, TileGradient<A>);
  const int64_t row = first + int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  const int r = thread_in_block() % kTile;
  if (thread_in_block() < kTile) {
    load_tile_gradient(rows, problem, problem.a, problem.b, grad_out, row, r);
  } else {
    load_tile_gradient(columns, problem, problem.b, problem.a, grad_out, column, r);
  }
  TileSums<A> c;
  similarity_tile(problem, row, column, a, b, c);
  const SimilarityTile<T> tile{problem, a, b, row, column, c};
  const A scale = problem.temperature.template scale<A>();
  const A inverse_temperature = static_cast<A>(1 / problem.temperature.value());
  A slope = 0;
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = tile_row(down, k), j = tile_column(across, k);
        const bool part = tile.takes_part(i, j);
        A gradient = 0;
        if (part) {
          const A similarity = c[down][across][k], exponent = similarity * scale;
          gradient = rows.share[i] * power2(exponent - rows.log[i]) +
                     columns.share[j] * power2(exponent - columns.log[j]) -
                     tile.weight(i, j) * (rows.attract[i] + columns.attract[j]);
          slope += gradient * similarity;
        }
        if (grad_weights && row + i < problem.a.n && column + j < problem.b.n) {
          const A pull = part ? rows.attract[i] * (c[down][across][k] - rows.positive[i]) +
                                    columns.attract[j] * (c[down][across][k] - columns.positive[j])
                              : A(0);
          grad_weights[(row + i) * problem.b.n + column + j] = static_cast<T>(-pull * inverse_temperature);
        }
        if (part) gradient *= a.factor[i] * b.factor[j];
        strip[(int64_t{blockIdx.y} * kTile + i) * problem.b.rows + column + j] = static_cast<gradient_t<T>>(gradient);
      }
  const double total = block_sum(static_cast<double>(slope));
  if (thread_in_block() == 0) slopes[(row / kTile) * gridDim.x + blockIdx.x] = total;
}

template <typename T, bool OfRows>
constexpr int kGradientBytes = kTileBytes<gradient_t<T>, T, acc_t<T>, OfRows, false>;

// out [64 · gridDim.y, width] ← or += strip · rows (`OfRows`: strip [64 · gridDim.y, depth]) or stripᵀ · rows (strip
// [depth, 64 · gridDim.y]); rows [depth, width].
template <typename T, bool OfRows>
__global__ void __launch_bounds__(kTileThreads, 4)
    product_kernel(const gradient_t<T>* __restrict__ strip, int64_t stride, const T* __restrict__ rows, int64_t depth,
                   int64_t width, bool add, acc_t<T>* __restrict__ out) {
  using A = acc_t<T>;
  const int64_t row = int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  TileSums<A> c;
  tile_product<OfRows, false>(c, strip + (OfRows ? row * stride : row), stride, rows + column, width, depth,
                              width - column);
#pragma unroll
  for (int down = 0; down < 2; ++down)
#pragma unroll
    for (int across = 0; across < 4; ++across)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t j = column + tile_column(across, i);
        A* to = out + (row + tile_row(down, i)) * width + j;
        if (j < width) *to = add ? *to + c[down][across][i] : c[down][across][i];
      }
}

// grad_x ← (g - <g, u> u) / (|x| temperature), a warp per row, where g is the gradient of the unit row u: that of one
// role or, where one tensor plays both, the sum.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4)
    project_kernel(const __grid_constant__ Side<T> own, const acc_t<T>* __restrict__ gradient,
                   const __grid_constant__ Side<T> second, const acc_t<T>* __restrict__ second_gradient,
                   const __grid_constant__ Temperature temperature, T* __restrict__ grad_x) {
  using A = acc_t<T>;
  const int64_t warps = int64_t{gridDim.x} * (kRowThreads / kWarp);
  const A scale = static_cast<A>(1 / temperature.value());
  for (int64_t i = int64_t{blockIdx.x} * (kRowThreads / kWarp) + warp_id(); i < own.n; i += warps) {
    // The strip holds gradients of products of `unit` rows, so that of a unit row still has its factor in it.
    const A factor = own.factor[i], second_factor = second_gradient ? second.factor[i] : A(0);
    const bool first = !(factor <= 0), other = !(second_factor <= 0);
    const A inverse_norm = first ? own.inverse_norm[i] : other ? second.inverse_norm[i] : A(0);
    const T* unit = first ? own.unit : second.unit;
    const A unit_factor = first ? factor : second_factor;
    const auto at = [&](int64_t k) {
      A g = 0;
      if (first) g += gradient[i * own.width + k] / factor;
      if (other) g += second_gradient[i * own.width + k] / second_factor;
      return g;
    };
    const auto u = [&](int64_t k) { return static_cast<A>(unit[i * own.width + k]) * unit_factor; };
    const bool any = first || other;
    A dot = 0;
    for (int64_t k = lane_id(); any && k < own.d; k += kWarp) dot += at(k) * u(k);
    dot = warp_sum(dot);
    for (int64_t k = lane_id(); k < own.d; k += kWarp)
      grad_x[i * own.d + k] = static_cast<T>(any ? (at(k) - dot * u(k)) * inverse_norm * scale : A(0));
  }
}

// One block: grad_temperature ← -Σ slopes / temperature².
template <typename S>
__global__ void __launch_bounds__(kFinishThreads, 1)
    temperature_kernel(const double* __restrict__ slopes, int64_t count,
                       const __grid_constant__ Temperature temperature, S* __restrict__ grad) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum += slopes[i];
  sum = block_sum(sum);
  const double value = temperature.value();
  if (threadIdx.x == 0) *grad = static_cast<S>(static_cast<acc_t<S>>(-sum / (value * value)));
}

}  // namespace msacore::contrastive
