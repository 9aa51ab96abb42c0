// What one conversation needs in a propagation: how its means are scaled, who sends, and the buffers of its tile.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "propagation/propagation.h"
#include "propagation/propagation_window_tile.h"

namespace msacore::propagation::cpu {

// What the operator was called with; `gate` [N, M] says who sends, null when everybody does.
struct Call {
  WindowSizes sizes;
  const int64_t* offsets;
  const bool* gate;
  int64_t past, future, steps;
  double alpha;
  Send send;
};

// The half-steps of one step. Ungated: intra [length], inter [1]; gated: everything per node, [length, M], with all
// bits set in `sends` where a node sends into the inter half-step, in `next_sends` where into the next intra half-step.
template <typename A>
struct Gates {
  using Bits = typename Row<A>::Bits;
  const A *intra, *inter;
  const Bits *sends, *next_sends;
};

// The scales (1-α)/count of one conversation and its tile buffers, kept by a thread from task to task.
template <typename A>
struct Conversation {
  using Bits = typename Row<A>::Bits;
  int64_t length = 0, past = 0, future = 0;
  std::vector<A> intra, gated_intra, inter, gated_inter;
  std::vector<Bits> gate, everybody;
  int64_t nodes = 0;
  std::unique_ptr<Row<A>[]> buffer;
  Row<A>*x, *h, *next, *ends, *work;
  int64_t capacity = -1;

  void prepare(const Call& call, int64_t begin, int64_t end) {
    const int64_t M = call.sizes.modalities;
    const A keep = static_cast<A>(1 - call.alpha);
    length = end - begin;
    nodes = length * M;
    past = call.past < 0 ? length - 1 : std::min(call.past, length - 1);
    future = call.future < 0 ? length - 1 : std::min(call.future, length - 1);
    intra.resize(length);
    for (int64_t i = 0; i < length; ++i)
      intra[i] = keep / static_cast<A>(std::min(i, past) + std::min(length - 1 - i, future) + 1);
    inter.assign(nodes, M > 1 ? keep / static_cast<A>(M - 1) : A(0));
    if (call.gate) prepare_gates(call.gate + begin * M, M, keep);
    reserve(M);
  }

  // Whether any half-step of step k leaves missing nodes out.
  static bool gated(const Call& call, int64_t k) { return call.gate && (call.send == Send::kNever || k == 0); }

  Gates<A> gates(const Call& call, int64_t k) const {
    const bool never = call.send == Send::kNever;
    if (!gated(call, k)) return {intra.data(), inter.data(), nullptr, nullptr};
    return {gated_intra.data(), never ? gated_inter.data() : inter.data(), never ? gate.data() : everybody.data(),
            never && k + 1 < call.steps ? gate.data() : everybody.data()};
  }

 private:
  void prepare_gates(const bool* sends, int64_t M, A keep) {
    everybody.assign(nodes, Bits(-1));
    gate.resize(nodes);
    gated_intra.resize(nodes);
    gated_inter.resize(nodes);
    for (int64_t e = 0; e < nodes; ++e) gate[e] = sends[e] ? Bits(-1) : Bits(0);
    for (int64_t m = 0; m < M; ++m) {
      int64_t senders = 0;
      for (int64_t j = 0; j < future; ++j) senders += sends[j * M + m];
      for (int64_t i = 0; i < length; ++i) {
        if (i + future < length) senders += sends[(i + future) * M + m];
        if (i > past) senders -= sends[(i - past - 1) * M + m];
        gated_intra[i * M + m] = senders ? keep / static_cast<A>(senders) : A(0);
      }
    }
    for (int64_t i = 0; i < length; ++i) {
      int64_t here = 0;
      for (int64_t m = 0; m < M; ++m) here += sends[i * M + m];
      for (int64_t m = 0; m < M; ++m) {
        const int64_t others = here - sends[i * M + m];
        gated_inter[i * M + m] = others ? keep / static_cast<A>(others) : A(0);
      }
    }
  }

  void reserve(int64_t M) {
    const int64_t rows = 4 * nodes + 3 * M;
    if (rows > capacity) {
      buffer.reset(new Row<A>[rows]);
      capacity = rows;
    }
    x = buffer.get();
    h = x + nodes;
    next = h + nodes;
    ends = next + nodes;
    work = ends + nodes;
  }
};

}  // namespace msacore::propagation::cpu
