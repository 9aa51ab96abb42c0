// What a block does with one conversation and some columns: all steps of a propagation, or one window mean.
#pragma once
#include "propagation/propagation_headroom.h"
#include "propagation/propagation_slide.cuh"

namespace msacore::propagation::cuda {

enum class Kind { kPropagate, kPropagateGradient, kWindowMean, kWindowMeanGradient };

template <Kind kKind>
constexpr bool kIsGradient = kKind == Kind::kPropagateGradient || kKind == Kind::kWindowMeanGradient;

constexpr int kThreads = 256;
// A task covers 2^kTaskShift columns; a block takes at most 2^kWidestShift at a time. A block that takes more than its
// task covers also does the work of neighbouring tasks, which then have nothing to do.
constexpr int kTaskShift = 5, kWidestShift = 6;

// A call of an operator, as the kernel sees it.
template <typename T>
struct Call {
  using A = acc_t<T>;
  Neighbours graph;
  int64_t width, steps;
  Headroom<A> room;
  A alpha, others;                         // the share of x; the scale of an ungated inter half-step
  bool never;                              // missing nodes never send; else they do from the first inter half-step on
  bool spare;                              // a fourth buffer is needed
  int shift = 0;                           // columns at a time, 2^shift, where a block can hold them
  int64_t longest[kWidestShift + 1] = {};  // [i]: longest conversation that fits a block with 2^i columns
  // States of longer conversations, [3 or 4, N, M, d], and what their tables hold, [slices, N, 1 or M]; null where all
  // conversations fit.
  A* scratch = nullptr;
  Row<A, int64_t>* rows = nullptr;
  A* scales = nullptr;  // [slices, N, 2 M], with a gate only
  int64_t* senders = nullptr;

  __host__ __device__ int64_t buffers() const { return spare ? 4 : 3; }
  __host__ __device__ int64_t gated_modalities() const { return graph.gate ? graph.modalities : 0; }
  // Distance from a column to the next in shared memory: odd, so that neighbouring threads use different banks.
  __host__ __device__ int64_t pitch(int64_t length) const { return (length * graph.modalities) | 1; }
  // Bytes of shared memory for `length` utterances, 2^of_shift columns at a time.
  int64_t bytes(int64_t length, int of_shift) const {
    const int64_t scales = 2 * gated_modalities() * sizeof(A), senders_ = gated_modalities() * sizeof(int);
    const int64_t states = ((buffers() * pitch(length)) << of_shift) * sizeof(A);
    return states + length * (static_cast<int64_t>(sizeof(Row<A, int>)) + scales + senders_);
  }
  __host__ __device__ int64_t tasks_of_conversation() const {
    return (width + (int64_t{1} << kTaskShift) - 1) >> kTaskShift;
  }
};

// Values of the modalities of an utterance in one thread's column: in memory or in registers.
template <typename A>
struct InMemory {
  A* at;
  int64_t stride;
  __device__ __forceinline__ A& operator()(int m) const { return at[m * stride]; }
};
template <typename A, int kM>
struct InRegisters {
  A at[kM];
  __device__ __forceinline__ A& operator()(int m) { return at[m]; }
};

// out(m) = Σ_{n ≠ m} in(n), without subtracting in(m) from a total, which would let a NaN reach its own modality.
template <int kM, typename A, typename In, typename Out>
__device__ __forceinline__ void sum_others(In& in, int modalities, Out& out) {
  const int M = kM > 0 ? kM : modalities;
  if (M == 1) {
    out(0) = A(0);
    return;
  }
  out(1) = in(0);
#pragma unroll
  for (int m = 2; m < M; ++m) out(m) = out(m - 1) + in(m - 1);
  A after = in(M - 1);
#pragma unroll
  for (int m = M - 2; m > 0; --m) {
    out(m) += after;
    after += in(m);
  }
  out(0) = after;
}

// One block's conversation and columns. A thread has one column and the utterances begin … end - 1; other threads read
// the states it writes only after a barrier. kM > 0 fixes M at compile time and keeps an utterance's sums in registers.
template <bool kOnChip, int kM, Kind kKind, typename T>
struct Task {
  using A = acc_t<T>;
  using Index = std::conditional_t<kOnChip, int, int64_t>;
  static constexpr int kGroup = kM > 0 ? kM : 1;  // modalities that slide together

  const Call<T>& call;
  int64_t first_node, place;  // of the conversation; offset of that node, at this thread's column, in [N, M, d]
  Index begin, end;           // this thread's rows
  Table<A, Index> table;
  A *h, *next, *third, *spare;  // at this thread's column
  bool inside;                  // the column exists
  bool gated = false;           // this step's first half-step leaves missing nodes out
  bool more = false;            // there is a step after this one
  bool scaled = false;          // the states are multiplied by a power of two

  __device__ __forceinline__ int modalities() const { return kM > 0 ? kM : call.graph.modalities; }
  // Distance from node to node: a column is contiguous on chip, and keeps the order of [N, M, d] in global memory.
  __device__ __forceinline__ Index stride() const { return kOnChip ? 1 : static_cast<Index>(call.width); }
  __device__ __forceinline__ Index node(Index i, int m) const { return i * modalities() + m; }
  __device__ __forceinline__ int64_t global(Index e) const { return place + e * call.width; }
  __device__ __forceinline__ bool sends(Index e) const { return call.graph.gate[first_node + e]; }
  __device__ __forceinline__ A& of(A* buffer, Index e) const { return buffer[e * stride()]; }

  template <bool kGated>
  __device__ __forceinline__ A intra(Index i, Index e) const {
    return kGated ? table.gated_intra[e] : table.rows[i].intra;
  }
  // Where missing nodes never send, they stay out of the second half-step and of the first half-step of the next step.
  template <bool kGated>
  __device__ __forceinline__ A inter(Index e) const {
    return kGated && call.never ? table.gated_inter[e] : call.others;
  }
  template <bool kGated>
  __device__ __forceinline__ bool silent(Index e) const {
    return kGated && call.never && !sends(e);
  }

  template <typename Use>
  __device__ __forceinline__ void each_node(Use&& use) const {
    if (!inside) return;
    for (Index i = begin; i < end; ++i)
      for (int m = 0; m < modalities(); ++m) use(i, node(i, m));
  }

  // Calls use(i, m0, sums [kGroup]) for all rows i of this thread, with the sums of `from` over the rows within reach
  // of i.
  template <typename Use>
  __device__ __forceinline__ void each_window(const A* from, Use&& use) const {
    if (!inside) return;
    const int M = modalities();
    for (int m0 = 0; m0 < M; m0 += kGroup) {
      const Index at = m0 * stride(), row = M * stride();
      const Slide<kGroup, A, Index> slide{from + at, next + at, row, stride(), begin, end};
      if (call.graph.include_self) {
        slide.run([&](Index i) { return table.rows[i].first; }, [&](Index i) { return table.rows[i].last; },
                  [&](Index i, A* sums) { use(i, m0, sums); });
        continue;
      }
      slide.run([&](Index i) { return table.rows[i].first; }, [&](Index i) { return i - 1; },
                [&](Index i, A* sums) {
#pragma unroll
                  for (int g = 0; g < kGroup; ++g) of(spare, node(i, m0 + g)) = sums[g];
                });
      slide.run([&](Index i) { return i + 1; }, [&](Index i) { return table.rows[i].last; },
                [&](Index i, A* sums) {
#pragma unroll
                  for (int g = 0; g < kGroup; ++g) sums[g] += of(spare, node(i, m0 + g));
                  use(i, m0, sums);
                });
    }
  }

  // Calls update(i, values, others) for all rows. `values` are those of the utterance's modalities: the window sums of
  // `from`, or what h holds where `from` is null. `others` has room for the same number of values.
  template <typename Update>
  __device__ __forceinline__ void each_row(const A* from, Update&& update) const {
    if constexpr (kM > 0) {
      const auto use = [&](Index i, int, A* sums) {
        InRegisters<A, kGroup> values, others;
#pragma unroll
        for (int m = 0; m < kM; ++m) values(m) = sums[m];
        update(i, values, others);
      };
      if (from) return each_window(from, use);
      for (Index i = begin; inside && i < end; ++i) {
        A own[kGroup];
#pragma unroll
        for (int m = 0; m < kM; ++m) own[m] = of(h, node(i, m));
        use(i, 0, own);
      }
    } else {
      if (from) each_window(from, [&](Index i, int m, A* sums) { of(spare, node(i, m)) = sums[0]; });
      for (Index i = begin; inside && i < end; ++i) {
        InMemory<A> values{&of(spare, node(i, 0)), stride()}, others{&of(next, node(i, 0)), stride()};
        for (int m = 0; !from && m < modalities(); ++m) values(m) = of(h, node(i, m));
        update(i, values, others);
      }
    }
  }

  // A row is stored after all its loads, so that its values may stay in registers.
  template <typename Values>
  __device__ __forceinline__ void store_next(Index i, Values& values) const {
    if constexpr (kM > 0) {  // else `values` is that memory
#pragma unroll
      for (int m = 0; m < kM; ++m) of(next, node(i, m)) = values(m);
    }
  }

  // next = (1-α) A_inter ((1-α) A_intra h + α x) + α x, with α x in `third`. States hold what a node sends, 0 where it
  // does not.
  template <bool kGated>
  __device__ __forceinline__ void forward_step() const {
    const int M = modalities();
    each_row(h, [&](Index i, auto& u, auto& result) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const Index e = node(i, m);
        u(m) = silent<kGated>(e) ? A(0) : intra<kGated>(i, e) * u(m) + of(third, e);
      }
      sum_others<kM, A>(u, M, result);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const Index e = node(i, m);
        result(m) = more && silent<kGated>(e) ? A(0) : inter<kGated>(e) * result(m) + of(third, e);
      }
      store_next(i, result);
    });
  }

  // With λ the gradient of a step's result: G = (1-α) A_interᵀ λ and `third` += α (λ + G); next = (1-α) D_intra⁻¹ G,
  // whose transposed window sums are λ of the step before. `from`: the input of the window sums that give λ of this
  // step; null in the last step, where h holds λ.
  template <bool kGated>
  __device__ __forceinline__ void backward_step(const A* from) const {
    const int M = modalities();
    const A alpha = call.alpha;
    each_row(from, [&](Index i, auto& lambda, auto& g) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const Index e = node(i, m);
        if (more && silent<kGated>(e)) lambda(m) = A(0);
        if (alpha != 0) of(third, e) += alpha * lambda(m);
        lambda(m) *= inter<kGated>(e);
      }
      sum_others<kM, A>(lambda, M, g);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const Index e = node(i, m);
        if (silent<kGated>(e)) g(m) = A(0);
        if (alpha != 0) of(third, e) += alpha * g(m);
        g(m) *= intra<kGated>(i, e);
      }
      store_next(i, g);
    });
  }

  __device__ __forceinline__ void set_step(int64_t k) {
    gated = call.graph.gate && (call.never || k == 0);
    more = k + 1 < call.steps;
  }
  __device__ __forceinline__ void swap_states() {
    A* const before = h;
    h = next;
    next = before;
    __syncthreads();
  }

  __device__ __forceinline__ bool is_read(Index e) const {
    return kIsGradient<kKind> || !call.graph.gate || sends(e) || !(call.never || call.alpha == 0);
  }
  // Calls set(i, e, value) to write the states of this thread's nodes; other threads may read them afterwards. Where
  // sums of one of the block's columns could overflow, all its columns are multiplied by a power of two.
  template <typename Set>
  __device__ __forceinline__ void load_states(const T* __restrict__ from, Set&& set) {
    bool beyond = false;
    each_node([&](Index i, Index e) {
      const A value = static_cast<A>(from[global(e)]);
      if (kNeedsHeadroom<T>) beyond = beyond || (call.room.is_beyond(value) && is_read(e));
      set(i, e, value);
    });
    if (!kNeedsHeadroom<T> || call.steps == 0) return __syncthreads();
    scaled = __syncthreads_or(beyond);
    if (!scaled) return;
    each_node([&](Index, Index e) {
      of(h, e) *= call.room.down;
      if (kKind == Kind::kPropagate) of(third, e) *= call.room.down;
    });
    __syncthreads();
  }
  // A result as it is stored.
  __device__ __forceinline__ T stored(A value) const {
    return static_cast<T>(scaled ? call.room.restored(value, !kIsGradient<kKind>) : value);
  }

  __device__ void propagate(const T* __restrict__ x, T* __restrict__ out) {
    const A alpha = call.alpha;
    load_states(x, [&](Index, Index e, A value) {
      // Without a step nothing is sent, and the result is x.
      of(h, e) = call.steps > 0 && call.graph.gate && !sends(e) ? A(0) : value;
      // α = 0 drops the term instead of multiplying by it: a missing node's x is then not read at all.
      of(third, e) = alpha == 0 ? A(0) : alpha * value;
    });
    for (int64_t k = 0; k < call.steps; ++k) {
      set_step(k);
      gated ? forward_step<true>() : forward_step<false>();
      swap_states();
    }
    each_node([&](Index, Index e) { out[global(e)] = stored(of(h, e)); });
  }

  __device__ void propagate_gradient(const T* __restrict__ grad_out, T* __restrict__ grad_x) {
    load_states(grad_out, [&](Index, Index e, A value) {
      of(h, e) = value;
      of(third, e) = call.steps > 0 ? A(0) : value;
    });
    for (int64_t k = call.steps - 1; k >= 0; --k) {
      set_step(k);
      const A* from = more ? h : nullptr;
      gated ? backward_step<true>(from) : backward_step<false>(from);
      swap_states();
    }
    if (call.steps > 0)
      each_window(h, [&](Index i, int m0, A* sums) {
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          const Index e = node(i, m0 + g);
          if (!call.graph.gate || sends(e)) of(third, e) += sums[g];
        }
      });
    each_node([&](Index, Index e) { grad_x[global(e)] = stored(of(third, e)); });
  }

  __device__ void window_mean(const T* __restrict__ from, T* __restrict__ to) {
    constexpr bool kBackward = kKind == Kind::kWindowMeanGradient;
    const auto scale = [&](Index i, Index e) { return call.graph.gate ? table.gated_intra[e] : table.rows[i].intra; };
    load_states(from, [&](Index i, Index e, A value) {
      if (kBackward)
        of(h, e) = scale(i, e) * value;
      else
        of(h, e) = call.graph.gate && !sends(e) ? A(0) : value;
    });
    each_window(h, [&](Index i, int m, A* sums) {
      const Index e = node(i, m);
      if (kBackward)
        to[global(e)] = stored(call.graph.gate && !sends(e) ? A(0) : sums[0]);
      else
        to[global(e)] = stored(scale(i, e) * sums[0]);
    });
  }

  __device__ void run(const T* __restrict__ from, T* __restrict__ to) {
    if constexpr (kKind == Kind::kPropagate)
      propagate(from, to);
    else if constexpr (kKind == Kind::kPropagateGradient)
      propagate_gradient(from, to);
    else
      window_mean(from, to);
  }
};

}  // namespace msacore::propagation::cuda
