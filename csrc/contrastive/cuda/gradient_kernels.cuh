// The backward pass of contrastive losses on CUDA: gradients of a strip of similarities, their products with the rows,
// and the way back through the normalisation.
#pragma once
#include <algorithm>

#include "contrastive/cuda/kernels.cuh"

namespace msacore::contrastive::cuda {

// How gradients of similarities are kept in memory: as a sum of `Parts` numbers.
template <typename G, int Parts>
struct Kept {
  using Number = G;
  static constexpr int kParts = Parts;
};

template <typename T>
__device__ __forceinline__ AnchorGradient<acc_t<T>> anchor_gradient(const Problem<T>& problem, const Side<T>& own,
                                                                    const Side<T>& other, int64_t i) {
  using A = acc_t<T>;
  const bool counts = i < own.n && own.stats && own.stats[kTotal * own.n + i] != A(0);
  if (!counts || !problem.choice(other, i)) return no_anchor<A>();
  return anchor_gradient(own.stats, own.n, i,
                         problem.gradient.of(i, own.counts[1], problem.temperature, &own == &problem.b),
                         problem.denominator);
}

// Stores neighbours in one access; for 16-bit numbers nvcc would make two.
template <typename G>
__device__ __forceinline__ void store_pair(G* to, const Vector<G, 2>& pair) {
#ifdef __CUDACC__
  if constexpr (sizeof(pair) == 4) {
    *reinterpret_cast<unsigned*>(to) = *reinterpret_cast<const unsigned*>(&pair);
    return;
  }
#endif
  store(to, pair);
}

// Pairwise positives: c ← c - weight · attraction, where c holds gradients of similarities.
template <typename T>
__device__ __forceinline__ void attract_pairs(const SimilarityTile<T>& tile, const AnchorGradient<acc_t<T>>* rows,
                                              const AnchorGradient<acc_t<T>>* columns, TileSums<acc_t<T>>& c) {
  for_pairs(c, [&](acc_t<T>& gradient, int i, int j) {
    if (tile.takes_part(i, j)) gradient -= tile.weight(i, j) * (rows[i].attract + columns[j].attract);
  });
}

// c: similarities ← their gradients, pair by pair. For denominators without positives, and where what a pair adds to
// the slope (anchor.cuh) must be known from that pair alone. Returns the slope.
template <typename T>
__device__ __forceinline__ acc_t<T> gradients_apart(const SimilarityTile<T>& tile, const AnchorGradient<acc_t<T>>* rows,
                                                    const AnchorGradient<acc_t<T>>* columns, acc_t<T> scale,
                                                    TileSums<acc_t<T>>& c) {
  using A = acc_t<T>;
  const Denominator denominator = tile.problem.denominator;
  A slope = 0;
  for_pairs(c, [&](A& value, int i, int j) {
    const A similarity = value;
    value = 0;
    if (!tile.takes_part(i, j)) return;
    const A weight = tile.weight(i, j);
    const AnchorGradient<A>&a = rows[i], &b = columns[j];
    if (weight == A(0) || denominator == Denominator::kAll) value = softmax_gradient(a, b, similarity, scale, slope);
    if (weight == A(0)) return;
    const auto pull = [&](const AnchorGradient<A>& anchor) {
      const A rest = denominator == Denominator::kNegatives ? rest_of(anchor.exponent(similarity, scale)) : A(1);
      return relative(-weight * anchor.attract * rest, anchor, similarity, slope);
    };
    value += pull(a) + pull(b);
  });
  return slope;
}

// The gradients of the weights of the tile's pairs, from their similarities.
template <typename T>
__device__ __forceinline__ void weight_gradients(const SimilarityTile<T>& tile, const AnchorGradient<acc_t<T>>* rows,
                                                 const AnchorGradient<acc_t<T>>* columns, acc_t<T> scale,
                                                 TileSums<acc_t<T>>& c, T* grad_weights) {
  using A = acc_t<T>;
  const int64_t n = tile.problem.a.n, m = tile.problem.b.n;
  const Denominator denominator = tile.problem.denominator;
  const A temperature = static_cast<A>(tile.problem.temperature.value());
  for_pairs(c, [&](A similarity, int i, int j) {
    if (tile.row + i >= n || tile.column + j >= m) return;
    A gradient = 0;
    const bool part = tile.takes_part(i, j);
    if (part && denominator == Denominator::kNegatives) {
      // Ratio of the gradient of a single positive's loss to that of the anchor. A pair of weight 0 has none.
      const auto excess = [&](const AnchorGradient<A>& anchor) {
        return anchor.attract == A(0) ? A(0)
                                      : anchor.attract * temperature *
                                            (loss_against_rest(anchor.exponent(similarity, scale)) - anchor.positive);
      };
      if (tile.weight(i, j) != A(0)) gradient = excess(rows[i]) + excess(columns[j]);
    } else if (part) {
      gradient =
          rows[i].attract * (rows[i].positive - similarity) + columns[j].attract * (columns[j].positive - similarity);
    }
    grad_weights[(tile.row + i) * m + tile.column + j] = static_cast<T>(gradient);
  });
}

// Grid as for statistics_kernel. Writes the strips' gradients of the products of `unit` rows [terms, parts,
// strip, b.rows], kept as K, except positives that are sums over classes; for a single term also those of the weights
// (unless null); and, unless null, what each tile adds to Σ gradient · similarity over all pairs [terms, tiles].
template <typename T, typename K, int Most, bool Apart>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 8 ? 1 : 3)
    gradient_kernel(const __grid_constant__ Terms<T, Most> terms, int64_t first,
                    typename K::Number* __restrict__ strips, T* __restrict__ grad_weights,
                    double* __restrict__ slopes) {
  using A = acc_t<T>;
  const Problem<T>& problem = terms.at[blockIdx.z];
  const int64_t strip_size = int64_t{gridDim.y} * kTile * problem.b.rows;
  typename K::Number* const strip = strips + blockIdx.z * K::kParts * strip_size;
  MSACORE_SHARED(a, TileSide<A>);
  MSACORE_SHARED(b, TileSide<A>);
  MSACORE_SHARED(rows, AnchorGradient<A>[kTile]);
  MSACORE_SHARED(columns, AnchorGradient<A>[kTile]);
  const int64_t row = first + int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  const int r = thread_in_block() % kTile;
  const A scale = problem.temperature.template scale<A>();
  const bool bounded = !Apart && problem.bounded(scale);
  double slope = 0;  // an anchor's positives count in the first tile of its row or column
  const auto load_anchor = [&](AnchorGradient<A>& to, const AnchorGradient<A>& anchor, bool first_tile) {
    // Relative to the same similarity as the softmax's part: statistics of few samples hold their highest even where
    // exponents are bounded.
    if (!Apart && first_tile)
      slope -= static_cast<double>(anchor.softmax_weight) * (anchor.positive - (bounded ? A(1) : anchor.highest));
    to = anchor;
    if (bounded) to.softmax_weight *= power2((1 - anchor.highest) * scale - anchor.log);
  };
  if (thread_in_block() < kTile) {
    load_anchor(rows[r], anchor_gradient(problem, problem.a, problem.b, row + r), column == 0);
  } else {
    load_anchor(columns[r], anchor_gradient(problem, problem.b, problem.a, column + r), row == 0);
  }
  TileSums<A> c;
  const SimilarityTile<T> tile = load_tile(problem, row, column, a, b);
  find_similarities_again(tile, c);
  if (grad_weights) weight_gradients(tile, rows, columns, scale, c, grad_weights);
  A softmax_slope = 0;
  if constexpr (Apart) {
    softmax_slope = gradients_apart(tile, rows, columns, scale, c);
  } else {
    const auto add_softmax = [&](const auto& gradient_of) {
      if (tile.whole) {
        for_pairs(c, [&](A& value, int i, int j) { value = gradient_of(rows[i], columns[j], value); });
      } else {
        for_pairs(c, [&](A& value, int i, int j) {
          value = tile.takes_part(i, j) ? gradient_of(rows[i], columns[j], value) : A(0);
        });
      }
    };
    if (bounded) {  // relative to 1
      add_softmax([&](const AnchorGradient<A>& a, const AnchorGradient<A>& b, A similarity) {
        const A gradient = (a.softmax_weight + b.softmax_weight) * power2((similarity - 1) * scale);
        softmax_slope += gradient * (similarity - 1);
        return gradient;
      });
    } else {
      add_softmax([&](const AnchorGradient<A>& a, const AnchorGradient<A>& b, A similarity) {
        return softmax_gradient(a, b, similarity, scale, softmax_slope);
      });
    }
    if (problem.pairwise) {
      attract_pairs(tile, rows, columns, c);
    } else if (problem.diagonal() && tile.on_diagonal()) {
      for_pairs(c, [&](A& gradient, int i, int j) {
        if (i == j && tile.takes_part(i, j)) gradient -= rows[i].attract + columns[j].attract;
      });
    }
  }
  using Number = typename K::Number;
  for_neighbours(c, [&](int i, int j, A first_gradient, A second_gradient) {
    Number* to = strip + (int64_t{blockIdx.y} * kTile + i) * problem.b.rows + column + j;
    A gradient[2] = {first_gradient * (a.factor[i] * b.factor[j]), second_gradient * (a.factor[i] * b.factor[j + 1])};
#pragma unroll
    for (int p = 0; p < K::kParts; ++p, to += strip_size) {
      const Vector<Number, 2> kept{{static_cast<Number>(gradient[0]), static_cast<Number>(gradient[1])}};
      store_pair(to, kept);
      gradient[0] -= static_cast<A>(kept.at[0]);
      gradient[1] -= static_cast<A>(kept.at[1]);
    }
  });
  if (slopes) {
    slope = block_sum(slope + softmax_slope);
    const int64_t tiles = problem.a.rows / kTile * gridDim.x;
    if (thread_in_block() == 0) slopes[blockIdx.z * tiles + row / kTile * gridDim.x + blockIdx.x] = slope;
  }
}

template <typename T, typename K>
constexpr int kProductBytes = std::max(kTileBytes<typename K::Number, T, acc_t<T>, true, false>,
                                       kTileBytes<typename K::Number, T, acc_t<T>, false, false>);

// A gradient that product_kernel sums up: Side::gradient of all roles that one embedding plays.
template <typename A>
struct Output {
  A* gradient;  // [rows, width]
  int64_t rows, width;
};
template <typename A, int Most>
struct Outputs {
  Output<A> at[Most];
};

// Grid [tiles of the width, row tiles, outputs]. gradient ← or += Σ over `count` terms of strip · rows of b, where the
// output is that of a, and of stripᵀ · rows of a, where it is that of b. The strips [terms, parts, size, b.rows] begin
// at row `first` of a.
template <typename T, typename K, int MostTerms, int MostOutputs>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 8 ? 2 : 3)
    product_kernel(const __grid_constant__ Terms<T, MostTerms> terms, int count,
                   const __grid_constant__ Outputs<acc_t<T>, MostOutputs> outputs,
                   const typename K::Number* __restrict__ strips, int64_t first, int64_t size, bool add) {
  using A = acc_t<T>;
  using Strip = Matrix<typename K::Number>;
  const Output<A>& out = outputs.at[blockIdx.z];
  const int64_t row = int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  if (row < out.rows && column < out.width) {
    TileSums<A> c;
    clear(c);
    bool changed = !add;
    for (int t = 0; t < count * K::kParts; ++t) {
      const Side<T>&a = terms.at[t / K::kParts].a, &b = terms.at[t / K::kParts].b;
      const auto* strip = strips + t * size * b.rows;
      const bool of_a = a.gradient == out.gradient && row >= first && row < first + size;
      const bool of_b = b.gradient == out.gradient;
      changed = changed || of_a || of_b;
      if (of_a)
        add_tile_product<true, false>(c, Strip{strip + (row - first) * b.rows, b.rows, kTile, b.rows},
                                      Matrix<T>{b.unit + column, b.width, b.rows, b.width - column}, b.rows);
      if (of_b)
        add_tile_product<false, false>(c, Strip{strip + row, b.rows, size, kTile},
                                       Matrix<T>{a.unit + first * a.width + column, a.width, size, a.width - column},
                                       size);
    }
#pragma unroll
    for (int down = 0; down < 2; ++down)
#pragma unroll
      for (int across = 0; across < 4; ++across)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t j = column + tile_column(across, i);
          A* to = out.gradient + (row + tile_row(down, i)) * out.width + j;
          if (changed && j < out.width) *to = add ? *to + c[down][across][i] : c[down][across][i];
        }
  }
}

// Where the gradient of a learned temperature goes; a plain number has none.
struct TemperatureGradient {
  void* at;
  Temperature::Kind kind;

  __device__ void set(double gradient) const {
    switch (kind) {
      case Temperature::kFloat:
        *static_cast<float*>(at) = static_cast<float>(gradient);
        break;
      case Temperature::kDouble:
        *static_cast<double*>(at) = gradient;
        break;
      case Temperature::kHalf:
        *static_cast<Half*>(at) = static_cast<Half>(static_cast<float>(gradient));
        break;
      case Temperature::kBFloat16:
        *static_cast<BFloat16*>(at) = static_cast<BFloat16>(static_cast<float>(gradient));
        break;
      default:
        break;
    }
  }
};

namespace {  // several families include this file

constexpr int kSumThreads = 1024;

__device__ __forceinline__ double sum_of(const double* values, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += values[i];
  return block_sum(sum);
}

// One block: the gradient of a temperature, -Σ slopes / temperature. The gradients in the slopes are divided by the
// temperature already.
__global__ void __launch_bounds__(kSumThreads, 1)
    temperature_kernel(const double* __restrict__ slopes, int64_t count,
                       const __grid_constant__ Temperature temperature,
                       const __grid_constant__ TemperatureGradient gradient) {
  const double sum = sum_of(slopes, count);
  if (threadIdx.x == 0) gradient.set(-sum / temperature.value());
}

}  // namespace

// The way from the gradients of unit rows to that of an embedding.
template <typename T, typename G>
struct Projection {
  Side<T> own, second;  // `second`: another role that the same tensor plays
  bool two_roles;
  G* grad_x;  // [n, d]
};
template <typename T, int Most, typename G = T>
struct Projections {
  Projection<T, G> at[Most];
};

// Grid [blocks, projections]: grad_x ← (g - <g, u> u) / |x|, or g where rows were not normalised; a warp per row. g is
// the gradient of the unit row u: that of one role, or the sum of two.
template <typename T, int Most, typename G>
__global__ void __launch_bounds__(kRowThreads, 4)
    project_kernel(const __grid_constant__ Projections<T, Most, G> projections, bool normalized) {
  using A = acc_t<T>;
  const Projection<T, G>& projection = projections.at[blockIdx.y];
  const Side<T>&own = projection.own, &second = projection.second;
  const int64_t warps = int64_t{gridDim.x} * (kRowThreads / kWarp);
  for (int64_t i = int64_t{blockIdx.x} * (kRowThreads / kWarp) + warp_id(); i < own.n; i += warps) {
    // `gradient` is with respect to the rows of `unit`; divided by the factor it is that of a unit row.
    const A factor = own.factor[i], second_factor = projection.two_roles ? second.factor[i] : A(0);
    const bool first = !(factor <= 0), other = !(second_factor <= 0);
    const InverseNorm<A> inverse_norm = first ? own.inverse_norm[i] : second.inverse_norm[i];
    const T* unit = first ? own.unit : second.unit;
    const A unit_factor = first ? factor : second_factor;
    const auto at = [&](int64_t k) {
      A g = 0;
      if (first) g += own.gradient[i * own.width + k] / factor;
      if (other) g += second.gradient[i * own.width + k] / second_factor;
      return g;
    };
    const auto u = [&](int64_t k) { return static_cast<A>(unit[i * own.width + k]) * unit_factor; };
    const bool any = first || other;
    A dot = 0;
    for (int64_t k = lane_id(); any && normalized && k < own.d; k += kWarp) dot += at(k) * u(k);
    dot = warp_sum(dot);
    const TwoPowers<double> power = two_powers(inverse_norm.exponent);
    const auto scaled = [&](A gradient) { return power.times(static_cast<double>(gradient * inverse_norm.mantissa)); };
    for (int64_t k = lane_id(); k < own.d; k += kWarp) {
      A gradient = 0;
      if (any) gradient = static_cast<A>(scaled(normalized ? at(k) - dot * u(k) : at(k)));
      projection.grad_x[i * own.d + k] = static_cast<G>(gradient);
    }
  }
}

}  // namespace msacore::contrastive::cuda
