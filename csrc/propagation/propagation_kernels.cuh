// Propagation over conversations on the device, with no edge list. A block takes one conversation and some columns and
// keeps them in shared memory for all steps: x is read once, and the result is written once. How much a block can hold
// is fixed before the lengths are known, so a long conversation is taken fewer columns at a time; where not even one
// column fits, the same steps run in global memory. Offsets are clamped, and reaches are searched inside a
// conversation: bad values give wrong numbers, never an access out of bounds.
#pragma once
#include "cuda/rows.cuh"
#include "propagation/propagation_task.cuh"

namespace msacore::propagation::cuda {

// One task: the columns from `first` on of the conversation of `length_` utterances from `begin` on;
// from, to [N, M, d].
template <bool kOnChip, Kind kKind, int kM, typename T>
__device__ __forceinline__ void run_task(const Call<T>& call, const T* __restrict__ from, T* __restrict__ to,
                                         int64_t begin, int64_t length_, int64_t first, int shift) {
  using A = acc_t<T>;
  using Index = typename Task<kOnChip, kM, kKind, T>::Index;
  const int M = kM > 0 ? kM : call.graph.modalities, columns = 1 << shift;
  const int local = static_cast<int>(threadIdx.x) & (columns - 1), thread = static_cast<int>(threadIdx.x) >> shift;
  const Index length = static_cast<Index>(length_);
  A *states, *scales;
  int64_t size, gated = call.gated_modalities();
  Table<A, Index> table;
  if constexpr (kOnChip) {
    size = call.pitch(length) << shift;
    scales = dynamic_shared<A>() + call.buffers() * size;
    table.rows = reinterpret_cast<Row<A, Index>*>(scales + 2 * gated * length);
    table.senders = reinterpret_cast<Index*>(table.rows + length);
    states = dynamic_shared<A>() + local * call.pitch(length);
  } else {
    const int64_t row = (first >> shift) * call.graph.utterances + begin;
    size = call.graph.utterances * M * call.width;
    scales = call.scales + 2 * gated * row;
    table.rows = call.rows + row;
    table.senders = call.senders + gated * row;
    states = call.scratch + begin * M * call.width + first + local;
  }
  table.gated_intra = scales;
  table.gated_inter = scales + gated * length;
  table.template fill<kIsGradient<kKind>>(call.graph, begin, length, 1 - call.alpha);
  const Index rows = run_of_rows<Index>(call.graph, length, kThreads >> shift);
  const Index from_row = thread * rows < length ? thread * rows : length;
  const Index to_row = from_row + rows < length ? from_row + rows : length;
  const int64_t task_end = first + (columns > 1 << kTaskShift ? columns : 1 << kTaskShift);
  for (int64_t c = first; c < task_end && c < call.width; c += columns) {
    __syncthreads();
    const int64_t place = begin * M * call.width + c + local;
    Task<kOnChip, kM, kKind, T>{call,
                                begin * M,
                                place,
                                from_row,
                                to_row,
                                table,
                                states,
                                states + size,
                                states + 2 * size,
                                states + 3 * size,
                                c + local < call.width}
        .run(from, to);
    if (!kOnChip) states += columns;
  }
}

// from, to [N, M, d]
template <Kind kKind, int kM, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    conversations_kernel(Call<T> call, const T* __restrict__ from, T* __restrict__ to) {
  const int64_t tasks = call.tasks_of_conversation();
  for (int64_t task = blockIdx.y; task < tasks; task += gridDim.y) {
    for (int64_t v = blockIdx.x; v < call.graph.conversations; v += gridDim.x) {
      const int64_t begin = call.graph.begin(v), length = call.graph.end(v) - begin, first = task << kTaskShift;
      if (length <= 0) continue;
      int shift = call.shift;
      while (shift > 0 && length > call.longest[shift]) --shift;
      const bool on_chip = length <= call.longest[shift];
      if (!on_chip) shift = call.shift;
      if ((first & ((1 << shift) - 1)) != 0) continue;
      if (on_chip)
        run_task<true, kKind, kM>(call, from, to, begin, length, first, shift);
      else if (call.scratch)
        run_task<false, kKind, kM>(call, from, to, begin, length, first, shift);
      __syncthreads();
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
