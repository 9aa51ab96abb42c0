// Propagation over conversations on the CPU, with no edge list. A task is one conversation × one cache line of columns,
// kept in cache for all steps; tasks are independent, so results do not depend on the number of threads.
#include "core/round.h"
#include "propagation/propagation.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "core/dtype.h"
#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "propagation/propagation_conversation.h"
#include "propagation/propagation_window_tile.h"

namespace msacore::propagation::cpu {
using namespace msacore::cpu;
namespace {

constexpr int64_t kGrain = 32768;  // element updates a thread should have at least

void check_values(const char* op, const Call& call) {
  const WindowSizes& s = call.sizes;
  const int64_t *offsets = call.offsets, *positions = call.positions;
  check(offsets[0] == 0, op, "expected `offsets[0]` to be 0, got ", offsets[0]);
  check(offsets[s.conversations] == s.utterances, op, "expected `offsets[-1]` to be N = ", s.utterances, ", got ",
        offsets[s.conversations]);
  for (int64_t v = 0; v < s.conversations; ++v)
    check(offsets[v] <= offsets[v + 1], op, "expected `offsets` to be non-decreasing, got ", offsets[v], " before ",
          offsets[v + 1], " at position ", v);
  for (int64_t v = 0; positions && v < s.conversations; ++v)
    for (int64_t i = offsets[v] + 1; i < offsets[v + 1]; ++i)
      check(positions[i - 1] < positions[i], op,
            "expected `positions` to increase strictly within a conversation, got ", positions[i - 1], " before ",
            positions[i], " at row ", i);
}

// A modality count known at compile time keeps all sums of an utterance in registers; 0 is the general form.
template <typename Body>
void dispatch_modalities(int64_t modalities, Body&& body) {
  modalities == 3 ? body(std::integral_constant<int, 3>{}) : body(std::integral_constant<int, 0>{});
}

// Runs body(conversation, first element of the tile, its width) for every conversation and every tile of columns. Parts
// are equal ranges of utterances × tiles; a task belongs to the part in which it begins.
template <typename A, typename Body>
void for_each_tile(const Call& call, Body&& body) {
  const WindowSizes& s = call.sizes;
  constexpr int64_t kWidth = Row<A>::kWidth;
  const int64_t tiles = ceil_div(s.width, kWidth);
  const int64_t work = kWidth * s.modalities * std::max<int64_t>(1, call.steps);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  const auto conversation_of_thread = [] { return Conversation<A>(); };
  const auto part = [&](Conversation<A>& conversation, int64_t from, int64_t to) {
    int64_t v = std::upper_bound(call.offsets, call.offsets + s.conversations + 1, from / tiles) - call.offsets - 1;
    for (; v < s.conversations && call.offsets[v] * tiles < to; ++v) {
      const int64_t begin = call.offsets[v], end = call.offsets[v + 1], length = end - begin;
      if (length == 0) continue;
      bool prepared = false;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t start = begin * tiles + tile * length;
        if (start < from || start >= to) continue;
        if (!prepared) conversation.prepare(call, begin, end);
        prepared = true;
        body(conversation, begin * s.modalities * s.width + tile * kWidth, std::min(kWidth, s.width - tile * kWidth));
      }
    }
  };
  parallel_for(0, s.utterances * tiles, grain, conversation_of_thread, part);
}

// next = (1-α) A_inter ((1-α) A_intra h + α x) + α x, with α x in c.x
template <int kM, bool kGated, typename A>
MSACORE_INLINE void forward_step(const Conversation<A>& c, int64_t modalities, const Gates<A>& gates, const Row<A>* h,
                                 Row<A>* next) {
  const int64_t M = kM > 0 ? kM : modalities;
  const auto use = [&](int64_t i, Row<A>* u) __attribute__((always_inline)) {
    Row<A> in_registers[kM > 0 ? kM : 1];
    Row<A>* others = kM > 0 ? in_registers : c.others;
    for (int64_t m = 0; m < M; ++m) {
      const int64_t e = i * M + m;
      u[m] = gates.intra[kGated ? e : i] * u[m] + c.x[e];
      if (kGated) u[m] = u[m].where(gates.sends[e]);
    }
    sum_others<kM>(u, M, others);
    for (int64_t m = 0; m < M; ++m) {
      const int64_t e = i * M + m;
      Row<A> row = gates.inter[kGated ? e : 0] * others[m] + c.x[e];
      next[e] = kGated ? row.where(gates.next_sends[e]) : row;
    }
  };
  for_each_window<kM>(h, c.length, M, c.reach, c.include_self, c.windows, use);
}

// Runs all steps from x in c.h; returns where the result is. A state buffer holds what a node sends, zeros where it
// does not send.
template <int kM, typename A>
MSACORE_SIMD Row<A>* forward_tile(const Call& call, const Conversation<A>& c) {
  const int64_t M = call.sizes.modalities;
  const A alpha = static_cast<A>(call.alpha);
  Row<A>*h = c.h, *next = c.next;
  if (call.steps == 0) return h;
  // α = 0 drops the term instead of multiplying by it: a missing node's x is then not read at all.
  for (int64_t e = 0; e < c.nodes; ++e) c.x[e] = alpha == 0 ? Row<A>{} : alpha * h[e];
  if (call.gate)
    for (int64_t e = 0; e < c.nodes; ++e) h[e] = h[e].where(c.gate[e]);
  for (int64_t k = 0; k < call.steps; ++k) {
    const Gates<A> gates = c.gates(call, k);
    c.gated(call, k) ? forward_step<kM, true>(c, M, gates, h, next) : forward_step<kM, false>(c, M, gates, h, next);
    std::swap(h, next);
    if (c.interrupted(call)) break;
  }
  return h;
}

// One step of the adjoint. With λ = dL/dH of a step's result, G = (1-α) A_interᵀ λ and c.x += α (λ + G); writes the
// input (1-α) D_intra⁻¹ G of the transposed window sum that gives λ of the step before. `first`: h holds λ itself.
template <int kM, bool kGated, typename A>
MSACORE_INLINE void backward_step(const Conversation<A>& c, int64_t modalities, const Gates<A>& gates, A alpha,
                                  bool first, const Row<A>* h, Row<A>* next) {
  const int64_t M = kM > 0 ? kM : modalities;
  const auto use = [&](int64_t i, Row<A>* lambda) __attribute__((always_inline)) {
    Row<A> in_registers[kM > 0 ? kM : 1];
    Row<A>* g = kM > 0 ? in_registers : c.others;
    for (int64_t m = 0; m < M; ++m) {
      const int64_t e = i * M + m;
      if (kGated) lambda[m] = lambda[m].where(gates.next_sends[e]);
      if (alpha != 0) c.x[e] = c.x[e] + alpha * lambda[m];
      lambda[m] = gates.inter[kGated ? e : 0] * lambda[m];
    }
    sum_others<kM>(lambda, M, g);
    for (int64_t m = 0; m < M; ++m) {
      const int64_t e = i * M + m;
      if (kGated) g[m] = g[m].where(gates.sends[e]);
      if (alpha != 0) c.x[e] = c.x[e] + alpha * g[m];
      next[e] = gates.intra[kGated ? e : i] * g[m];
    }
  };
  if (first) {
    Row<A> in_registers[kM > 0 ? kM : 1];
    Row<A>* lambda = kM > 0 ? in_registers : c.windows.sums;
    for (int64_t i = 0; i < c.length; ++i) {
      for (int64_t m = 0; m < M; ++m) lambda[m] = h[i * M + m];
      use(i, lambda);
    }
  } else {
    for_each_window<kM>(h, c.length, M, c.heard_by, c.include_self, c.windows, use);
  }
}

// Computes the gradient of x, and returns where it is, from the gradient of the result in c.h.
template <int kM, typename A>
MSACORE_SIMD Row<A>* backward_tile(const Call& call, const Conversation<A>& c) {
  const int64_t M = call.sizes.modalities;
  const A alpha = static_cast<A>(call.alpha);
  Row<A>*h = c.h, *next = c.next;
  if (call.steps == 0) return h;
  for (int64_t e = 0; e < c.nodes; ++e) c.x[e] = Row<A>{};
  for (int64_t k = call.steps - 1; k >= 0; --k) {
    const Gates<A> gates = c.gates(call, k);
    const bool first = k + 1 == call.steps;
    c.gated(call, k) ? backward_step<kM, true>(c, M, gates, alpha, first, h, next)
                     : backward_step<kM, false>(c, M, gates, alpha, first, h, next);
    std::swap(h, next);
    if (c.interrupted(call)) break;
  }
  const auto use = [&](int64_t i, Row<A>* lambda) __attribute__((always_inline)) {
    for (int64_t m = 0; m < (kM > 0 ? kM : M); ++m) {
      const int64_t e = i * (kM > 0 ? kM : M) + m;
      c.x[e] = c.x[e] + (call.gate ? lambda[m].where(c.gate[e]) : lambda[m]);
    }
  };
  for_each_window<kM>(h, c.length, M, c.heard_by, c.include_self, c.windows, use);
  return c.x;
}

// A_intra h, or A_intraᵀ h (kTransposed): a half-step without its share of x.
template <int kM, bool kTransposed, typename A>
MSACORE_SIMD Row<A>* window_mean_tile(const Call& call, const Conversation<A>& c) {
  const int64_t M = kM > 0 ? kM : call.sizes.modalities;
  const auto scale = [&](int64_t e) { return call.gate ? c.gated_intra[e] : c.intra[e / M]; };
  for (int64_t e = 0; e < c.nodes; ++e) {
    if (kTransposed)
      c.h[e] = scale(e) * c.h[e];
    else if (call.gate)
      c.h[e] = c.h[e].where(c.gate[e]);
  }
  const auto use = [&](int64_t i, Row<A>* sum) __attribute__((always_inline)) {
    for (int64_t m = 0; m < M; ++m) {
      const int64_t e = i * M + m;
      if (kTransposed)
        c.next[e] = call.gate ? sum[m].where(c.gate[e]) : sum[m];
      else
        c.next[e] = scale(e) * sum[m];
    }
  };
  for_each_window<kM>(c.h, c.length, M, kTransposed ? c.heard_by : c.reach, c.include_self, c.windows, use);
  return c.next;
}

// A_inter h of an utterance whose kM modalities all send; A_inter is then its own transpose. Every element is read
// once.
template <int kM, typename A, typename T>
MSACORE_INLINE void modality_mean_of_all(const T* __restrict__ h, T* __restrict__ out, int64_t d) {
  constexpr A kFactor = A(1) / (kM - 1);
  for (int64_t c = 0; c < d; ++c) {
    A value[kM];
    for (int m = 0; m < kM; ++m) value[m] = kFactor * static_cast<A>(h[m * d + c]);
    for (int m = 0; m < kM; ++m) {
      A sum = 0;
      for (int n = 0; n < kM; ++n)
        if (n != m) sum += value[n];
      out[m * d + c] = static_cast<T>(sum);
    }
  }
}

// A_inter h, or A_interᵀ h, of utterances begin … end; h and out [N, M, d], gate [N, M] or null. `sum` holds d.
template <bool kTransposed, typename T, typename A>
MSACORE_SIMD void modality_mean_range(const T* __restrict__ h, const bool* __restrict__ gate, T* __restrict__ out,
                                      A* __restrict__ sum, const WindowSizes& s, int64_t begin, int64_t end) {
  const int64_t M = s.modalities, d = s.width;
  for (int64_t i = begin; i < end; ++i) {
    const bool* sends = gate ? gate + i * M : nullptr;
    int64_t senders = M;
    if (sends) senders = std::count(sends, sends + M, true);
    if (M == 3 && senders == M) {
      modality_mean_of_all<3, A>(h + i * M * d, out + i * M * d, d);
      continue;
    }
    const auto scale = [&](int64_t m) {
      const int64_t others = senders - (sends ? sends[m] : 1);
      return others ? A(1) / static_cast<A>(others) : A(0);
    };
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t c = 0; c < d; ++c) sum[c] = 0;
      for (int64_t n = 0; n < M; ++n) {
        if (n == m || (sends && !sends[kTransposed ? m : n])) continue;
        const A factor = scale(kTransposed ? n : m);
        const T* row = h + (i * M + n) * d;
        for (int64_t c = 0; c < d; ++c) sum[c] += factor * static_cast<A>(row[c]);
      }
      for (int64_t c = 0; c < d; ++c) out[(i * M + m) * d + c] = static_cast<T>(sum[c]);
    }
  }
}

// Maps h [N, M, d] to `out`, conversation by conversation; `tile` runs one task of the kind.
template <typename Tile>
void over_conversations(const char* op, const Call& call, const Tensor& h, Tensor& out, Tile&& tile) {
  check_values(op, call);
  if (out.numel() == 0) return;
  on_huge_pages(out);
  const WindowSizes& s = call.sizes;
  dispatch_floating(h.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* from = h.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    dispatch_modalities(s.modalities, [&](auto count) {
      for_each_tile<acc_t<T>>(call, [&](const Conversation<acc_t<T>>& c, int64_t at, int64_t width) {
        const bool beyond = load_rows(from + at, s.width, c.nodes, width, c.h, c.headroom.limit);
        if constexpr (kNeedsHeadroom<T>) {
          const ScaledColumns<acc_t<T>> scaled(call, c, beyond);
          Row<acc_t<T>>* result = tile(count, call, c);
          scaled.restore(c, result);
          store_rows(result, c.nodes, width, to + at, s.width);
        } else {
          store_rows(tile(count, call, c), c.nodes, width, to + at, s.width);
        }
      });
    });
  });
  call.interruption->check(op);
}

Call call_of(const WindowSizes& sizes, const Windows& windows, const OptionalTensor& gate, Direction direction,
             Interruption& interruption) {
  return {sizes,
          windows.offsets.const_data_ptr<int64_t>(),
          data_or_null<int64_t>(windows.positions),
          data_or_null<bool>(gate),
          windows.past,
          windows.future,
          windows.include_self,
          1,
          0.0,
          Send::kNever,
          direction == Direction::kBackward,
          &interruption};
}

void propagate(const char* op, const PropagateCall& given, Direction direction, const Tensor& x, Tensor& out) {
  Interruption interruption;
  Call call = call_of(given.sizes, given.windows, given.gate, direction, interruption);
  call.steps = given.steps;
  call.alpha = given.alpha;
  call.send = given.send;
  over_conversations(op, call, x, out, [](auto count, const Call& call, const auto& c) {
    constexpr int kM = decltype(count)::value;
    return call.backward ? backward_tile<kM>(call, c) : forward_tile<kM>(call, c);
  });
}

void window_mean(const char* op, const WindowMeanCall& given, Direction direction, const Tensor& h, Tensor& out) {
  Interruption interruption;
  const Call call = call_of(given.sizes, given.windows, given.gate, direction, interruption);
  over_conversations(op, call, h, out, [](auto count, const Call& call, const auto& c) {
    constexpr int kM = decltype(count)::value;
    return call.backward ? window_mean_tile<kM, true>(call, c) : window_mean_tile<kM, false>(call, c);
  });
}

void modality_mean(const char* op, const ModalityMeanCall& call, Direction direction, const Tensor& h, Tensor& out) {
  if (out.numel() == 0) return;
  on_huge_pages(out);
  const WindowSizes& s = call.sizes;
  const bool* gate = data_or_null<bool>(call.gate);
  dispatch_floating(h.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* from = h.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const int64_t grain = std::max<int64_t>(1, kGrain / (s.modalities * s.modalities * s.width));
    parallel_for(0, s.utterances, grain, [&](int64_t begin, int64_t end) {
      std::vector<acc_t<T>> sum(s.width);
      direction == Direction::kForward ? modality_mean_range<false>(from, gate, to, sum.data(), s, begin, end)
                                       : modality_mean_range<true>(from, gate, to, sum.data(), s, begin, end);
    });
  });
}

using Operators = PropagationOperators<propagate, window_mean, modality_mean>;

}  // namespace
}  // namespace msacore::propagation::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def(
      "propagate(Tensor x, Tensor offsets, Tensor? available, Tensor? positions, *, int past, int future, bool "
      "include_self, int steps, float alpha, int send) -> Tensor");
  m.def(
      "propagate_backward(Tensor grad_out, Tensor offsets, Tensor? available, Tensor? positions, *, int past, int "
      "future, bool include_self, int steps, float alpha, int send) -> Tensor");
  m.def(
      "window_mean(Tensor h, Tensor offsets, Tensor? senders, Tensor? positions, *, int past, int future, bool "
      "include_self) -> Tensor");
  m.def(
      "window_mean_backward(Tensor grad_out, Tensor offsets, Tensor? senders, Tensor? positions, *, int past, int "
      "future, bool include_self) -> Tensor");
  m.def("modality_mean(Tensor h, Tensor? senders) -> Tensor");
  m.def("modality_mean_backward(Tensor grad_out, Tensor? senders) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  using msacore::propagation::Direction;
  using msacore::propagation::cpu::Operators;
  m.impl("propagate", TORCH_BOX(&Operators::propagate<Direction::kForward>));
  m.impl("propagate_backward", TORCH_BOX(&Operators::propagate<Direction::kBackward>));
  m.impl("window_mean", TORCH_BOX(&Operators::window_mean<Direction::kForward>));
  m.impl("window_mean_backward", TORCH_BOX(&Operators::window_mean<Direction::kBackward>));
  m.impl("modality_mean", TORCH_BOX(&Operators::modality_mean<Direction::kForward>));
  m.impl("modality_mean_backward", TORCH_BOX(&Operators::modality_mean<Direction::kBackward>));
}
