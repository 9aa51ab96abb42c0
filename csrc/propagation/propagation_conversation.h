// What one conversation needs in a propagation: who is within reach, how its means are scaled, who sends, and the
// buffers of its tile.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/interrupt.h"
#include "propagation/propagation.h"
#include "propagation/propagation_headroom.h"
#include "propagation/propagation_window_tile.h"

namespace msacore::propagation::cpu {

// What the operator was called with, as pointers; `gate` [N, M] and `positions` [N] may be null.
struct Call {
  WindowSizes sizes;
  const int64_t *offsets, *positions;
  const bool* gate;
  int64_t past, future;
  bool include_self;
  int64_t steps;
  double alpha;
  Send send;
  bool backward;
  Interruption* interruption;
};

// What the half-steps of one step scale by, and who sends. Ungated: intra [length], inter [1]. Gated: everything per
// node, [length, M]; all bits are set in `sends` where a node sends into the inter half-step, and in `next_sends` where
// it sends into the next intra half-step.
template <typename A>
struct Gates {
  using Bits = typename Row<A>::Bits;
  const A *intra, *inter;
  const Bits *sends, *next_sends;
};

// Rows within reach of every row of a conversation, found in one walk: neither end of a window ever moves back.
class Reaches {
 public:
  // `positions` [length] or null; past and future as in the operator, -1 for the whole side.
  void find(int64_t length, const int64_t* positions, int64_t past, int64_t future) {
    by_number_ = !positions;
    past_ = past < 0 ? length - 1 : std::min(past, length - 1);
    future_ = future < 0 ? length - 1 : std::min(future, length - 1);
    first_.resize(length);
    last_.resize(length);
    int64_t first = 0, last = 0;
    for (int64_t i = 0; i < length; ++i) {
      const auto beyond = [&](int64_t from, int64_t to, int64_t side) {
        // Positions rise, so the distance between any two of them fits an unsigned number.
        const uint64_t apart = positions ? static_cast<uint64_t>(positions[to]) - static_cast<uint64_t>(positions[from])
                                         : static_cast<uint64_t>(to - from);
        return side >= 0 && apart > static_cast<uint64_t>(side);
      };
      while (beyond(first, i, past)) ++first;
      while (last + 1 < length && (last < i || !beyond(i, last + 1, future))) ++last;
      first_[i] = first;
      last_[i] = last;
    }
  }
  Reach view() const { return {first_.data(), last_.data(), past_, future_, by_number_}; }

 private:
  std::vector<int64_t> first_, last_;
  int64_t past_, future_;
  bool by_number_;
};

// The scales (1-α)/count of one conversation and its tile buffers, kept by a thread from task to task.
template <typename A>
struct Conversation {
  using Bits = typename Row<A>::Bits;
  int64_t length = 0, nodes = 0;
  bool include_self = true;
  Headroom<A> headroom{0};
  Reach reach, heard_by;  // the rows that a row hears; the rows that hear it (gradients only)
  std::vector<A> intra, gated_intra, inter, gated_inter;
  std::vector<Bits> gate, everybody;
  Row<A>*x, *h, *next;
  WindowRows<A> windows;
  Row<A>* others;  // [M], where the modality count is not known at compile time
  mutable Interruption::Work work;

  void prepare(const Call& call, int64_t begin, int64_t end) {
    const int64_t M = call.sizes.modalities;
    const A keep = static_cast<A>(1 - call.alpha);
    length = end - begin;
    nodes = length * M;
    headroom = Headroom<A>(nodes);
    include_self = call.include_self;
    const int64_t* positions = call.positions ? call.positions + begin : nullptr;
    reaches_.find(length, positions, call.past, call.future);
    reach = reaches_.view();
    if (call.backward) {
      reversed_.find(length, positions, call.future, call.past);
      heard_by = reversed_.view();
    }
    intra.resize(length);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t count = reach.last[i] - reach.first[i] + include_self;
      intra[i] = count ? keep / static_cast<A>(count) : A(0);
    }
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

  // Counts a step; returns whether the call has to end.
  bool interrupted(const Call& call) const { return call.interruption->stop(work, nodes); }

 private:
  void prepare_gates(const bool* sends, int64_t M, A keep) {
    everybody.assign(nodes, Bits(-1));
    gate.resize(nodes);
    gated_intra.resize(nodes);
    gated_inter.resize(nodes);
    senders_.resize(length + 1);
    for (int64_t e = 0; e < nodes; ++e) gate[e] = sends[e] ? Bits(-1) : Bits(0);
    for (int64_t m = 0; m < M; ++m) {
      senders_[0] = 0;
      for (int64_t i = 0; i < length; ++i) senders_[i + 1] = senders_[i] + sends[i * M + m];
      for (int64_t i = 0; i < length; ++i) {
        const int64_t self = include_self ? 0 : sends[i * M + m];
        const int64_t count = senders_[reach.last[i] + 1] - senders_[reach.first[i]] - self;
        gated_intra[i * M + m] = count ? keep / static_cast<A>(count) : A(0);
      }
    }
    for (int64_t i = 0; i < length; ++i) {
      int64_t here = 0;
      for (int64_t m = 0; m < M; ++m) here += sends[i * M + m];
      for (int64_t m = 0; m < M; ++m) {
        const int64_t count = here - sends[i * M + m];
        gated_inter[i * M + m] = count ? keep / static_cast<A>(count) : A(0);
      }
    }
  }

  void reserve(int64_t M) {
    const int64_t stored = 2 * (length + 1) * M, rows = 3 * nodes + stored + 4 * M;
    if (rows > capacity_) {
      buffer_.reset(new Row<A>[rows]);
      capacity_ = rows;
    }
    x = buffer_.get();
    h = x + nodes;
    next = h + nodes;
    windows = {next + nodes, next + nodes + stored};
    others = windows.sums + 3 * M;
  }

  Reaches reaches_, reversed_;
  std::vector<int64_t> senders_;  // of one modality, among the rows before each row
  std::unique_ptr<Row<A>[]> buffer_;
  int64_t capacity_ = -1;
};

// Columns of a tile that are multiplied by a power of two while they are propagated, because values that are read might
// make sums overflow.
template <typename A>
class ScaledColumns {
 public:
  // Scales c.h in place; `any_beyond`: some |value| exceeds the limit.
  ScaledColumns(const Call& call, const Conversation<A>& c, bool any_beyond)
      : headroom_(c.headroom), average_(!call.backward) {
    if (call.steps == 0 || !any_beyond) return;
    const bool gated = call.gate && !call.backward && (call.send == Send::kNever || call.alpha == 0);
    for (int64_t k = 0; k < kWidth; ++k) {
      bool beyond = false;
      for (int64_t e = 0; e < c.nodes; ++e) beyond |= (!gated || c.gate[e]) && headroom_.is_beyond(at(c.h, e, k));
      for (int64_t e = 0; beyond && e < c.nodes; ++e) at(c.h, e, k) *= headroom_.down;
      scaled_[k] = beyond;
      any_ |= beyond;
    }
  }

  void restore(const Conversation<A>& c, Row<A>* result) const {
    for (int64_t k = 0; any_ && k < kWidth; ++k)
      for (int64_t e = 0; scaled_[k] && e < c.nodes; ++e)
        at(result, e, k) = headroom_.restored(at(result, e, k), average_);
  }

 private:
  static constexpr int64_t kWidth = Row<A>::kWidth;
  static A& at(Row<A>* rows, int64_t e, int64_t k) { return reinterpret_cast<A*>(rows + e)[k]; }

  const Headroom<A>& headroom_;
  bool average_, any_ = false;
  bool scaled_[kWidth] = {};
};

}  // namespace msacore::propagation::cpu
