// The hierarchical contrastive loss of few samples on CUDA, where the time goes into launches: one kernel forward and
// one backward, for all terms.
#pragma once
#include "hierarchical_contrastive/hierarchical_contrastive_few_rows.cuh"

namespace msacore::hierarchical_contrastive::cuda {

template <typename A>
struct FewForward {
  Tiers tiers;
  A* stats;  // [terms, 2, 4, n]
  KeptSimilarities<A> kept;
  LossSum* sums;       // [terms, 2, row tiles]
  unsigned* done;      // how many blocks have finished, initially zero
  A *loss, *of_tiers;  // [], [3]
};

// Grid [row tiles, 2 · terms]: a block works on anchors of one direction of a term. The last block to finish adds
// everything up.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 2)
    few_forward_kernel(const __grid_constant__ FewInputs<T> in, const __grid_constant__ FewForward<acc_t<T>> to) {
  using A = acc_t<T>;
  const int direction = static_cast<int>(blockIdx.y), first = static_cast<int>(blockIdx.x) * kFewRows;
  const FewTerm& term = in.terms[direction / 2];
  const int own_side = term.side[direction % 2], other_side = term.side[1 - direction % 2];
  const FewStages<T> stages;
  MSACORE_SHARED(own, FewRows<A, kFewRows>);
  MSACORE_SHARED(other, FewRows<A, kFewCandidates>);
  MSACORE_SHARED(of_warps, Stats<A>[kRowThreads / kWarp][kFewRows]);
  const auto takes_part = [&](int i) { return in.takes_part(term, i); };
  const auto nothing = [](int, int, bool) {};
  const A scale = in.temperature[term.tier].template scale<A>();
  int candidates = 0;
  for (int i = thread_in_block(); i < in.n; i += kRowThreads) candidates += takes_part(i);
  candidates = block_sum(candidates);
  load_rows(own, in, own_side, first, takes_part, nothing);
  Stats<A> stats[2] = {no_stats<A>(), no_stats<A>()};  // of two rows
  for (int column = 0; column < in.n; column += kFewCandidates) {
    load_rows(other, in, other_side, column, takes_part, nothing);
    A c[2][4];
    few_similarities(c, stages, in, own, own_side, first, other, other_side, column);
    if (to.kept.at && direction % 2 == 0)
      for_few_kept(c, to.kept, direction / 2, first, column, false, [](A& at, A similarity) { at = similarity; });
    const FewPairs<A> pairs{term, own, other, first, column};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = mma_row(2 * half);
      A candidate[4], weight[4], similarity[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int j = few_candidate(k / 2, k % 2);
        const bool part = pairs.take_part(r, j);
        similarity[k] = part ? c[k / 2][2 * half + k % 2] : A(0);
        candidate[k] = part ? similarity[k] : kNothing<A>;
        weight[k] = part ? pairs.weight(r, j) : A(0);
      }
      merge(stats[half].softmax, softmax_of<1, 2>(candidate, scale), scale);
      merge(stats[half].positives, positives_of<1, 2>(weight, similarity));
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (lane_id() % 4 == 0) of_warps[warp_id()][mma_row(2 * half)] = stats[half];
  __syncthreads();
  bool last = false;
  if (warp_id() == 0) {
    LossSum sum{0, 0};
    const int r = lane_id(), i = first + r;
    if (r < kFewRows && i < in.n) {
      Stats<double> all = no_stats<double>();
      for (int w = 0; w < kRowThreads / kWarp; ++w) merge(all, in_double(of_warps[w][r]), static_cast<double>(scale));
      const bool choice = is_choice(candidates, term.self() && used(own.factor[r]));
      const double total = all.positives.total;
      sum.loss = finish_anchor(all.softmax, total, all.positives.mean(), choice, scale,
                               to.stats + int64_t{4} * direction * in.n, in.n, i);
      sum.anchors = total != 0;
    }
    sum.loss = warp_sum(sum.loss);
    sum.anchors = warp_sum(sum.anchors);
    if (lane_id() == 0) {
      to.sums[direction * gridDim.x + blockIdx.x] = sum;
      __threadfence();
      last = atomicAdd(to.done, 1u) + 1 == gridDim.x * gridDim.y;
    }
  }
  if (__syncthreads_or(last)) {
    __threadfence();
    finish_tiers(to.tiers, to.loss, to.of_tiers, [&](int64_t direction) {
      LossSum share{0, 0};
      for (unsigned tile = lane_id(); tile < gridDim.x; tile += kWarp) {
        const LossSum sum = to.sums[direction * gridDim.x + tile];
        share.loss += sum.loss;
        share.anchors += sum.anchors;
      }
      return share;
    });
  }
}

template <typename T>
struct FewBackward {
  const acc_t<T>* stats;  // [terms, 2, 4, n]
  KeptSimilarities<acc_t<T>> kept;
  LossGradient<acc_t<T>> gradient[Tiers::kCount];  // of a direction's mean loss, see Upstream::of_tier
  T* grads[kFewSides];                             // [n, width_of(side)]
  int stride;                                      // of the gradients in shared memory
  // Where temperatures are learned: what blocks add to the slopes (anchor.cuh), how many blocks have finished,
  // initially zero, and the results; else null.
  double* slopes;  // [blocks, tiers]
  unsigned* done;
  TemperatureGradient temperature_gradient[Tiers::kCount];
};

template <typename T>
constexpr int64_t few_backward_bytes(int64_t stride) {
  return FewStages<T>::kBytes + (kFewRows * (kFewGradientStride + stride)) * sizeof(acc_t<T>);
}

// The last block to finish adds the slopes up. Called by all blocks.
template <typename T>
__device__ __forceinline__ void finish_slopes(const FewInputs<T>& in, const FewBackward<T>& to,
                                              const double (&slopes)[Tiers::kCount]) {
  const int64_t blocks = int64_t{gridDim.x} * gridDim.y, block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  bool last = false;
  if (thread_in_block() == 0) {
    for (int k = 0; k < Tiers::kCount; ++k) to.slopes[block * Tiers::kCount + k] = slopes[k];
    __threadfence();
    last = atomicAdd(to.done, 1u) + 1 == blocks;
  }
  if (!__syncthreads_or(last)) return;
  __threadfence();
  for (int k = 0; k < Tiers::kCount; ++k) {
    double sum = 0;
    for (int64_t i = thread_in_block(); i < blocks; i += kRowThreads) sum += to.slopes[i * Tiers::kCount + k];
    sum = block_sum(sum);
    if (thread_in_block() == 0) to.temperature_gradient[k].set(-sum / in.temperature[k].value());
  }
}

// Grid [row tiles, sides]: a block works on rows of an embedding, and goes through the terms that the embedding is in.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 2)
    few_backward_kernel(const __grid_constant__ FewInputs<T> in, const __grid_constant__ FewBackward<T> to) {
  using A = acc_t<T>;
  const int own_side = static_cast<int>(blockIdx.y), first = static_cast<int>(blockIdx.x) * kFewRows;
  const int d = in.width_of(own_side);
  const FewStages<T> stages;
  A* const of_similarities = stages.rest;                              // [kFewRows, kFewGradientStride]
  A* const of_rows = of_similarities + kFewRows * kFewGradientStride;  // [kFewRows, to.stride]
  MSACORE_SHARED(own, FewRows<A, kFewRows>);
  MSACORE_SHARED(other, FewRows<A, kFewCandidates>);
  MSACORE_SHARED(own_gradients, AnchorGradient<A>[kFewRows]);
  MSACORE_SHARED(other_gradients, AnchorGradient<A>[kFewCandidates]);
  MSACORE_SHARED(counts, int64_t[2][2]);
  MSACORE_SHARED(slopes, double[Tiers::kCount]);
  if (thread_in_block() == 0)
    for (int k = 0; k < Tiers::kCount; ++k) slopes[k] = 0;
  for (int k = thread_in_block(); k < kFewRows * to.stride; k += kRowThreads) of_rows[k] = 0;
  for (int t = 0; t < in.term_count; ++t) {
    const FewTerm& term = in.terms[t];
    const bool second = term.side[0] != own_side;
    if (second && term.side[1] != own_side) continue;
    const int other_side = term.side[second ? 0 : 1];
    const auto takes_part = [&](int i) { return in.takes_part(term, i); };
    const auto stats_of = [&](bool of_second) { return to.stats + int64_t{4} * (2 * t + of_second) * in.n; };
    const A *const own_stats = stats_of(second), *const other_stats = term.self() ? own_stats : stats_of(!second);
    count_rows(in.n, in.n, own_stats, counts[0], takes_part);
    count_rows(in.n, in.n, other_stats, counts[1], takes_part);
    const auto gradient_of = [&](const A* stats, const int64_t (&count)[2], int i, bool part) {
      if (!part || stats[kTotal * in.n + i] == A(0) || !is_choice(count[0], term.self())) return no_anchor<A>();
      return anchor_gradient(stats, in.n, i, to.gradient[term.tier].of(i, count[1], in.temperature[term.tier]));
    };
    const A scale = in.temperature[term.tier].template scale<A>();
    load_rows(own, in, own_side, first, takes_part,
              [&](int r, int i, bool part) { own_gradients[r] = gradient_of(own_stats, counts[0], i, part); });
    A own_slope = 0, other_slope = 0;  // of the anchors of this side and of the other
    for (int column = 0; column < in.n; column += kFewCandidates) {
      load_rows(other, in, other_side, column, takes_part,
                [&](int r, int i, bool part) { other_gradients[r] = gradient_of(other_stats, counts[1], i, part); });
      A c[2][4];
      if (to.kept.at) {
        clear_few(c);
        for_few_kept(c, to.kept, t, first, column, second, [](const A& at, A& similarity) { similarity = at; });
      } else {
        few_similarities(c, stages, in, own, own_side, first, other, other_side, column);
      }
      const FewPairs<A> pairs{term, own, other, first, column};
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = mma_row(i), j = few_candidate(tile, i);
          A gradient = 0;
          if (pairs.take_part(r, j)) {
            const A similarity = c[tile][i], weight = pairs.weight(r, j);
            const auto of_anchor = [&](const AnchorGradient<A>& anchor, A& slope) {
              return relative(anchor.softmax_weight * probability(anchor, similarity, scale) - weight * anchor.attract,
                              anchor, similarity, slope);
            };
            gradient =
                other.factor[j] * (of_anchor(own_gradients[r], own_slope) + of_anchor(other_gradients[j], other_slope));
          }
          of_similarities[r * kFewGradientStride + j] = gradient;
        }
      __syncthreads();
      const int last = (d - 1) / kFewColumns * kFewColumns;  // staged already where similarities were computed
      for (int from = last; from >= 0; from -= kFewColumns) {
        if (from != last || to.kept.at) {
          __syncthreads();
          stage_rows(stages.other, other, in, other_side, column, from);
          __syncthreads();
        }
        if (from + warp_id() * 8 >= d) continue;
        A g[4];
        const auto at = [&](int i) -> A& {
          return of_rows[mma_row(i) * to.stride + from + warp_id() * 8 + mma_column(i)];
        };
#pragma unroll
        for (int i = 0; i < 4; ++i) g[i] = at(i);
        for (int k = 0; k < min(kFewCandidates, in.n - column); k += 8)
          add_product<false, is_16_bit<T>>(
              g, [&](int row, int step) { return of_similarities[row * kFewGradientStride + k + step]; },
              [&](int step, int j) { return stages.other[(k + step) * kFewStride + warp_id() * 8 + j]; });
#pragma unroll
        for (int i = 0; i < 4; ++i) at(i) = g[i];
      }
    }
    if (to.slopes && !second) {  // counted at a term's first side; where there is only one, its rows are all anchors
      const double slope = block_sum(static_cast<double>(term.self() ? own_slope : own_slope + other_slope));
      if (thread_in_block() == 0) slopes[term.tier] += slope;
    }
  }
  load_rows(
      own, in, own_side, first, [&](int i) { return in.available.meets(in.needs[own_side], i); },
      [](int, int, bool) {});
  for (int r = warp_id(); r < min(kFewRows, in.n - first); r += kRowThreads / kWarp) {
    const bool any = !(own.factor[r] <= 0);
    const T* const x = in.x[own_side] + int64_t{first + r} * d;
    const A* const gradient = of_rows + r * to.stride;
    const A factor = own.factor[r], low = own.scale[0][r], high = own.scale[1][r];
    const auto unit = [&](int k) { return static_cast<A>(x[k]) * low * high * factor; };
    A dot = 0;
    for (int k = lane_id(); any && in.normalize && k < d; k += kWarp) dot += gradient[k] * unit(k);
    dot = warp_sum(dot);
    T* const grad = to.grads[own_side] + int64_t{first + r} * d;
    for (int k = lane_id(); k < d; k += kWarp) {
      const A across = in.normalize && any ? gradient[k] - dot * unit(k) : gradient[k];
      grad[k] = static_cast<T>(any ? across * factor * low * high : A(0));
    }
  }
  if (to.slopes) finish_slopes(in, to, slopes);
}

}  // namespace msacore::hierarchical_contrastive::cuda
