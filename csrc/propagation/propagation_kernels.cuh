// Propagation over conversations on the device, with no edge list. A block takes one conversation and some columns and
// keeps them in shared memory for all steps: x is read once, the result written once. A conversation that is too long
// for that goes the same way through global memory. Offsets are clamped: bad ones give wrong numbers, never an access
// out of bounds. Sums are added up window by window: a non-finite state reaches only the nodes within reach.
#pragma once
#include "cuda/rows.cuh"

namespace msacore::propagation::cuda {
using namespace msacore::cuda;

constexpr int kThreads = 256;

// Who is whose neighbour. `gate` [N, M] says who sends, null when everybody does; past and future at most N.
struct Neighbours {
  const int64_t* offsets;
  const bool* gate;
  int64_t utterances, conversations, past, future;
  int modalities;

  __device__ int64_t begin(int64_t v) const { return clamped(offsets[v], utterances + 1); }
  __device__ int64_t end(int64_t v) const { return begin(v + 1); }
  __device__ int64_t conversation_of(int64_t i) const {
    const int64_t next = lower_bound(conversations + 1, i + 1, [&](int64_t v) { return offsets[v]; });
    return clamped(next - 1, conversations);
  }
  __device__ bool sends(int64_t node) const { return !gate || gate[node]; }
};

// Utterances [first, last] of i's conversation from which i hears, or with past and future exchanged who hear i.
struct Reach {
  int64_t first, last;

  __device__ Reach(int64_t i, int64_t begin, int64_t end, int64_t past, int64_t future)
      : first(i - past < begin ? begin : i - past), last(i + future >= end ? end - 1 : i + future) {}
  __device__ int64_t count() const { return last - first + 1; }
};

// Of every node keep / (how many it hears from), 0 where none: intra, inter [N, M]; inter may be null.
template <typename A>
__global__ void __launch_bounds__(kThreads, 4)
    scales_kernel(Neighbours graph, A* __restrict__ intra, A* __restrict__ inter, A keep) {
  const int M = graph.modalities;
  for (int64_t i = grid_thread(); i < graph.utterances; i += grid_threads()) {
    const int64_t v = graph.conversation_of(i);
    const Reach reach(i, graph.begin(v), graph.end(v), graph.past, graph.future);
    int here = 0;
    for (int m = 0; m < M; ++m) here += graph.sends(i * M + m);
    for (int m = 0; m < M; ++m) {
      int64_t senders = 0;
      for (int64_t j = reach.first; j <= reach.last; ++j) senders += graph.sends(j * M + m);
      intra[i * M + m] = senders > 0 ? keep / static_cast<A>(senders) : A(0);
      const int others = here - graph.sends(i * M + m);
      if (inter) inter[i * M + m] = others > 0 ? keep / static_cast<A>(others) : A(0);
    }
  }
}

template <typename T>
struct Call {
  using A = acc_t<T>;
  Neighbours graph;
  const A *intra, *inter;  // of gated half-steps, [N, M]
  int64_t width, steps;
  A alpha;
  bool never;  // missing nodes never send; else they do from the first inter half-step on
  // How the chip is used: 2^shift columns at a time, of conversations of up to `capacity` nodes.
  int shift;
  int64_t capacity;

  int64_t slices() const { return (width + (int64_t{1} << shift) - 1) >> shift; }
};

// One block's conversation and columns. Three buffers [nodes, stride] of states; a thread has one column and every
// rows-th utterance.
template <bool kOnChip, typename T>
struct Task {
  using A = acc_t<T>;
  using Index = std::conditional_t<kOnChip, int, int64_t>;
  const Call<T>& call;
  int64_t first_node, place;  // of the conversation; of its first node and this thread's column in [N, M, d]
  Index length, stride;
  int row, rows, M;
  bool inside;          // this thread's column exists
  A *h, *next, *third;  // at this thread's column

  // Calls use(e, i, m) for this thread's nodes e = i · M + m.
  template <typename Use>
  __device__ __forceinline__ void each_node(Use&& use) const {
    if (!inside) return;
    for (int m = 0; m < M; ++m)
      for (Index i = row; i < length; i += rows) use(i * M + m, i, m);
  }
  __device__ __forceinline__ int64_t global(Index e) const { return place + e * call.width; }
  __device__ __forceinline__ bool sends(Index e) const { return call.graph.gate[first_node + e]; }
  __device__ __forceinline__ bool gated_intra(int64_t k) const { return call.graph.gate && (call.never || k == 0); }
  __device__ __forceinline__ bool gated_inter() const { return call.graph.gate && call.never; }
  __device__ __forceinline__ A intra_scale(Index e, Index i, bool gated) const {
    if (gated) return call.intra[first_node + e];
    return (1 - call.alpha) / static_cast<A>(Reach(i, 0, length, call.graph.past, call.graph.future).count());
  }
  __device__ __forceinline__ A inter_scale(Index e) const {
    if (gated_inter()) return call.inter[first_node + e];
    return M > 1 ? (1 - call.alpha) / static_cast<A>(M - 1) : A(0);
  }

  // Calls use(e, i, Σ_j from[j, m]) for this thread's nodes, j within reach and, if `gated`, sending.
  template <typename Use>
  __device__ __forceinline__ void each_window(const A* from, int64_t past, int64_t future, bool gated,
                                              Use&& use) const {
    int before_m = -1;
    Index first = 0, last = -1;
    A sum = 0;
    each_node([&](Index e, Index i, int m) {
      const Reach reach(i, 0, length, past, future);
      if (m != before_m || reach.first != first || reach.last != last) {
        before_m = m, first = static_cast<Index>(reach.first), last = static_cast<Index>(reach.last);
        sum = 0;
        for (Index j = first; j <= last; ++j)
          if (!gated || sends(j * M + m)) sum += from[(j * M + m) * stride];
      }
      use(e, i, sum);
    });
  }

  __device__ void forward(const T* __restrict__ x, T* __restrict__ out) {
    const A alpha = call.alpha;
    // α = 0 drops the term rather than multiply by it: then a missing node's x is not read at all.
    const auto kept = [&](Index e) {
      if (alpha == 0) return A(0);
      return kOnChip ? third[e * stride] : alpha * static_cast<A>(x[global(e)]);
    };
    each_node([&](Index e, Index, int) {
      const A value = static_cast<A>(x[global(e)]);
      h[e * stride] = value;
      if (kOnChip) third[e * stride] = alpha * value;
    });
    for (int64_t k = 0; k < call.steps; ++k) {
      __syncthreads();
      const bool gated = gated_intra(k);
      each_window(h, call.graph.past, call.graph.future, gated,
                  [&](Index e, Index i, A sum) { next[e * stride] = intra_scale(e, i, gated) * sum + kept(e); });
      __syncthreads();
      each_node([&](Index e, Index i, int m) {
        A sum = 0;
        for (int n = 0; n < M; ++n)
          if (n != m && (!gated_inter() || sends(i * M + n))) sum += next[(i * M + n) * stride];
        h[e * stride] = inter_scale(e) * sum + kept(e);
      });
    }
    each_node([&](Index e, Index, int) { out[global(e)] = static_cast<T>(h[e * stride]); });
  }

  // With λ the gradient of a step's result: G = (1-α) A_interᵀ λ, grad_x += α (λ + G), λ ← (1-α) A_intraᵀ G; end
  // grad_x += λ.
  __device__ void backward(const T* __restrict__ grad_out, T* __restrict__ grad_x) {
    const A alpha = call.alpha;
    each_node([&](Index e, Index, int) {
      h[e * stride] = static_cast<A>(grad_out[global(e)]);
      third[e * stride] = 0;
    });
    for (int64_t k = call.steps - 1; k >= 0; --k) {
      __syncthreads();
      const bool gated = gated_intra(k);
      each_node([&](Index e, Index i, int m) {
        A sum = 0;
        for (int n = 0; n < M; ++n)
          if (n != m) sum += inter_scale(i * M + n) * h[(i * M + n) * stride];
        if (gated_inter() && !sends(e)) sum = 0;
        if (alpha != 0) third[e * stride] += alpha * (h[e * stride] + sum);
        next[e * stride] = intra_scale(e, i, gated) * sum;
      });
      __syncthreads();
      each_window(next, call.graph.future, call.graph.past, false,
                  [&](Index e, Index, A sum) { h[e * stride] = gated && !sends(e) ? A(0) : sum; });
    }
    each_node([&](Index e, Index, int) { grad_x[global(e)] = static_cast<T>(third[e * stride] + h[e * stride]); });
  }
};

// from, to [N, M, d]; `scratch` [3, N, M, d] is for conversations of more than `capacity` nodes, null where none can
// be.
template <bool kForward, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    propagate_kernel(Call<T> call, const T* __restrict__ from, T* __restrict__ to, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const int M = call.graph.modalities, columns = 1 << call.shift;
  const int local = static_cast<int>(threadIdx.x) & (columns - 1), row = static_cast<int>(threadIdx.x) >> call.shift;
  const int64_t slices = (call.width + columns - 1) >> call.shift, tasks = call.graph.conversations * slices;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t v = task / slices, column = ((task - v * slices) << call.shift) + local;
    const int64_t begin = call.graph.begin(v), length = call.graph.end(v) - begin;
    const int64_t first_node = begin * M, place = first_node * call.width + column;
    const auto run = [&](auto run_task) { kForward ? run_task.forward(from, to) : run_task.backward(from, to); };
    if (length > 0 && length * M <= call.capacity) {
      A* const h = dynamic_shared<A>() + local;
      const int64_t size = call.capacity << call.shift;
      run(Task<true, T>{call, first_node, place, static_cast<int>(length), columns, row, kThreads >> call.shift, M,
                        column < call.width, h, h + size, h + 2 * size});
    } else if (length > 0 && scratch) {
      A* const h = scratch + place;
      const int64_t size = call.graph.utterances * M * call.width;
      run(Task<false, T>{call, first_node, place, length, call.width, row, kThreads >> call.shift, M,
                         column < call.width, h, h + size, h + 2 * size});
    }
    __syncthreads();
  }
}

// A_intra h (kForward) or A_intraᵀ h, [N, M, d]; `scale` [N, M] of gated means, else null. Lanes own an utterance.
template <bool kForward, int V, typename T>
__global__ void __launch_bounds__(kThreads, 4)
    window_mean_kernel(Neighbours graph, const acc_t<T>* __restrict__ scale, const T* __restrict__ h,
                       T* __restrict__ out, int64_t width, Lanes lanes) {
  using A = acc_t<T>;
  const int M = graph.modalities;
  for (int64_t i = lanes.first_row(); i < graph.utterances; i += lanes.next_row()) {
    const int64_t v = graph.conversation_of(i), begin = graph.begin(v), end = graph.end(v);
    const auto scale_of = [&](int64_t j, int m) {
      if (scale) return scale[j * M + m];
      return A(1) / static_cast<A>(Reach(j, begin, end, graph.past, graph.future).count());
    };
    const Reach reach(i, begin, end, kForward ? graph.past : graph.future, kForward ? graph.future : graph.past);
    for (int m = 0; m < M; ++m) {
      const int64_t node = i * M + m;
      for (int64_t c = lanes.lane() * V; c < width; c += lanes.count() * V) {
        Vector<A, V> sum{};
        for (int64_t j = reach.first; (kForward || graph.sends(node)) && j <= reach.last; ++j) {
          if (kForward && !graph.sends(j * M + m)) continue;
          const auto value = load<V>(h + (j * M + m) * width + c);
          const A factor = kForward ? A(1) : scale_of(j, m);
#pragma unroll
          for (int s = 0; s < V; ++s) sum.at[s] += factor * static_cast<A>(value.at[s]);
        }
        Vector<T, V> result;
        const A factor = kForward ? scale_of(i, m) : A(1);
#pragma unroll
        for (int s = 0; s < V; ++s) result.at[s] = static_cast<T>(factor * sum.at[s]);
        store(out + node * width + c, result);
      }
    }
  }
}

// A_inter h (kForward) or A_interᵀ h, [N, M, d], gate [N, M] or null. Lanes own an utterance.
template <bool kForward, int V, typename T>
__global__ void __launch_bounds__(kThreads, 4)
    modality_mean_kernel(const bool* __restrict__ gate, const T* __restrict__ h, T* __restrict__ out,
                         int64_t utterances, int M, int64_t width, Lanes lanes) {
  using A = acc_t<T>;
  for (int64_t i = lanes.first_row(); i < utterances; i += lanes.next_row()) {
    const auto sends = [&](int m) { return !gate || gate[i * M + m]; };
    int here = 0;
    for (int m = 0; m < M; ++m) here += sends(m);
    const auto scale_of = [&](int m) {
      const int others = here - sends(m);
      return others > 0 ? A(1) / static_cast<A>(others) : A(0);
    };
    for (int m = 0; m < M; ++m) {
      for (int64_t c = lanes.lane() * V; c < width; c += lanes.count() * V) {
        Vector<A, V> sum{};
        for (int n = 0; n < M; ++n) {
          if (n == m || !sends(kForward ? n : m)) continue;
          const auto value = load<V>(h + (i * M + n) * width + c);
          const A factor = scale_of(kForward ? m : n);
#pragma unroll
          for (int s = 0; s < V; ++s) sum.at[s] += factor * static_cast<A>(value.at[s]);
        }
        Vector<T, V> result;
#pragma unroll
        for (int s = 0; s < V; ++s) result.at[s] = static_cast<T>(sum.at[s]);
        store(out + (i * M + m) * width + c, result);
      }
    }
  }
}

}  // namespace msacore::propagation::cuda
