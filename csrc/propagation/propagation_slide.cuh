// Who is within reach of whom, and sums over windows that slide along a conversation, on the device.
#pragma once
#include "core/round.h"
#include "cuda/rows.cuh"

namespace msacore::propagation::cuda {
using namespace msacore::cuda;

// The operator's graph; `positions` [N] and `gate` [N, M] may be null; past and future are -1 for the whole side.
struct Neighbours {
  const int64_t *offsets, *positions;
  const bool* gate;
  int64_t utterances, conversations, past, future;
  int modalities;
  bool include_self;

  __device__ int64_t begin(int64_t v) const { return clamped(offsets[v], utterances + 1); }
  __device__ int64_t end(int64_t v) const { return begin(v + 1); }

  // Whether `later` is more than `side` after `earlier`, both rows of [N].
  __device__ bool beyond(int64_t earlier, int64_t later, int64_t side) const {
    const uint64_t apart = positions
                               ? static_cast<uint64_t>(positions[later]) - static_cast<uint64_t>(positions[earlier])
                               : static_cast<uint64_t>(later - earlier);
    return side >= 0 && apart > static_cast<uint64_t>(side);
  }
};

// Rows [first, last] of one conversation that are within reach of row i, i itself among them.
template <typename Index>
struct Reach {
  Index first, last;

  __device__ Reach(const Neighbours& graph, int64_t begin, Index length, Index i, int64_t past, int64_t future) {
    if (!graph.positions) {
      first = past < 0 || past >= i ? 0 : static_cast<Index>(i - past);
      last = future < 0 || future >= length - 1 - i ? length - 1 : static_cast<Index>(i + future);
      return;
    }
    first = static_cast<Index>(
        lower_bound(i, 1, [&](int64_t j) { return int64_t{!graph.beyond(begin + j, begin + i, past)}; }));
    last = static_cast<Index>(i + lower_bound(length - 1 - i, 1, [&](int64_t k) {
                                return int64_t{graph.beyond(begin + i, begin + i + 1 + k, future)};
                              }));
  }
};

// How many consecutive rows of `length` each of `threads` threads takes. A run begins with a sum over its first window;
// the run is long enough that this sum costs at most four additions per row, whatever the window.
template <typename Index>
__device__ Index run_of_rows(const Neighbours& graph, Index length, int threads) {
  const auto side = [&](int64_t reach) { return reach < 0 || reach > length ? int64_t{length} : reach; };
  const int64_t widest = side(graph.past) + side(graph.future) + 1, window = widest < length ? widest : length;
  const Index even = ceil_div(length, threads), quarter = static_cast<Index>((window + 3) / 4);
  return even > quarter ? even : quarter;
}

// The rows within reach of an utterance, and the scale of its sums: (1-α)/count, or 0 where no row counts.
template <typename A, typename Index>
struct Row {
  Index first, last;
  A intra;
};

// The rows of a conversation and, where some nodes do not send, the scales of gated half-steps.
template <typename A, typename Index>
struct Table {
  Row<A, Index>* rows;           // [length]
  A *gated_intra, *gated_inter;  // [length, M]
  Index* senders;                // up to and including a row, [length, M]

  // Called by all threads of the block; the table may be read after a barrier. kTransposed: the reaches say who hears a
  // row.
  template <bool kTransposed>
  __device__ void fill(const Neighbours& graph, int64_t begin, Index length, A keep) const {
    const int M = graph.modalities;
    const bool* const gate = graph.gate ? graph.gate + begin * M : nullptr;
    if (gate) {
      count_senders(gate, length, M);
      __syncthreads();
    }
    const auto scale = [&](Index count) { return count > 0 ? keep / static_cast<A>(count) : A(0); };
    for (Index i = thread_in_block(); i < length; i += threads_in_block()) {
      const Reach<Index> reach(graph, begin, length, i, graph.past, graph.future);
      int here = 0;
      for (int m = 0; gate && m < M; ++m) here += gate[i * M + m];
      for (int m = 0; gate && m < M; ++m) {
        const Index before = reach.first > 0 ? senders[(reach.first - 1) * M + m] : 0;
        const Index self = graph.include_self ? 0 : gate[i * M + m];
        gated_intra[i * M + m] = scale(senders[reach.last * M + m] - before - self);
        gated_inter[i * M + m] = scale(here - gate[i * M + m]);
      }
      const Reach<Index> heard = kTransposed ? Reach<Index>(graph, begin, length, i, graph.future, graph.past) : reach;
      rows[i] = {heard.first, heard.last, scale(reach.last - reach.first + graph.include_self)};
    }
  }

 private:
  // A warp takes a modality: a vote counts 32 rows.
  __device__ void count_senders(const bool* gate, Index length, int M) const {
    const unsigned here_and_before = kAllLanes >> (kWarp - 1 - lane_id());
    for (int m = warp_id(); m < M; m += threads_in_block() / kWarp) {
      Index before = 0;
      for (Index start = 0; start < length; start += kWarp) {
        const Index i = start + lane_id();
        const unsigned vote = __ballot_sync(kAllLanes, i < length && gate[i * M + m]);
        if (i < length) senders[i * M + m] = before + __popc(vote & here_and_before);
        before += __popc(vote);
      }
    }
  }
};

// Sums over windows that slide along one thread's rows begin … end - 1, for G neighbouring modalities at once. `from`
// is read at any row; `slots` at this thread's own rows only. `row` and `node` are the strides of utterances and
// modalities.
template <int G, typename A, typename Index>
struct Slide {
  static constexpr int kTried = 8;
  const A* from;
  A* slots;
  Index row, node, begin, end;

  // Calls use(i, sums [G]) with Σ from[j], first(i) ≤ j ≤ last(i), for all rows; neither bound falls from row to row,
  // and first(i) ≤ last(i) + 1.
  //
  // The windows of several rows share a place where all of them can be cut. Sums from the cut backwards are added up
  // once, and each waits in its row's slot until the sum from the cut forwards joins it. So a row costs a fixed number
  // of additions, and no difference of running sums is taken, which would lose digits and carry a NaN beyond the
  // windows that hold it.
  template <typename First, typename Last, typename Use>
  __device__ __forceinline__ void run(First&& first, Last&& last, Use&& use) const {
    for (Index i = begin; i < end;) {
      const Index cut = last(i);
      // The rows that share the cut: mostly kTried, the number tried first, so that one look is enough.
      Index behind = i + kTried < end ? i + kTried : end;
#pragma unroll 1
      while (behind > i + 1 && first(behind - 1) > cut + 1) --behind;
#pragma unroll 1
      while (behind < end && first(behind) <= cut + 1) ++behind;
      A sums[G];
#pragma unroll
      for (int g = 0; g < G; ++g) sums[g] = 0;
      const A* at = from + cut * row;
      const A* const beyond = at + row;
      A* slot = slots + behind * row;
      Index j = cut;
#pragma unroll 1
      for (Index r = behind; r > i;) {
#pragma unroll 1  // a row or two enter at a time
        for (const Index stop = first(--r); j >= stop; --j, at -= row) add(sums, at);
        slot -= row;
#pragma unroll
        for (int g = 0; g < G; ++g) slot[g * node] = sums[g];
      }
#pragma unroll
      for (int g = 0; g < G; ++g) sums[g] = 0;
      at = beyond;
      j = cut;
#pragma unroll 1
      for (; i < behind; ++i) {
#pragma unroll 1
        for (const Index stop = last(i); j < stop; ++j, at += row) add(sums, at);
        A total[G];
#pragma unroll
        for (int g = 0; g < G; ++g) total[g] = slots[i * row + g * node] + sums[g];
        use(i, total);
      }
    }
  }

 private:
  __device__ __forceinline__ void add(A* sums, const A* at) const {
#pragma unroll
    for (int g = 0; g < G; ++g) sums[g] += at[g * node];
  }
};

}  // namespace msacore::propagation::cuda
