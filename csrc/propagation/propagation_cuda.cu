// Propagation over conversations on CUDA: scratch memory and launches.
#include "core/round.h"
#include "cuda/registration.cuh"
#include "propagation/propagation.h"
#include "propagation/propagation_kernels.cuh"

namespace msacore::propagation::cuda {
using namespace msacore::cuda;
namespace {

// Shared memory of a block where the mean conversation does not need more: four blocks fit a multiprocessor of 228 KiB.
#ifndef MSACORE_SMALL_SIZES
constexpr int64_t kShare = 56 * 1024;
#else
constexpr int64_t kShare = 2048;  // small, so that short conversations already take every path
#endif

Neighbours neighbours(const WindowSizes& s, const Windows& windows, const OptionalTensor& gate) {
  return {windows.offsets.const_data_ptr<int64_t>(),
          data_or_null<int64_t>(windows.positions),
          data_or_null<bool>(gate),
          s.utterances,
          s.conversations,
          windows.past,
          windows.future,
          static_cast<int>(s.modalities),
          windows.include_self};
}

// Headroom for a conversation of any length: the host does not know the lengths.
template <typename A>
Headroom<A> headroom(const Neighbours& graph) {
  return Headroom<A>(graph.utterances * graph.modalities);
}

// Chooses the columns at a time, and returns the shared memory of a block. The lengths are on the device; the host
// knows only their mean, and gives room for twice the mean: at full width if that leaves room for other blocks,
// otherwise at the width of a full sector of memory.
template <typename T>
int64_t plan(Call<T>& call) {
  constexpr int kSectorShift = 3;
  const int64_t mean = ceil_div(call.graph.utterances, call.graph.conversations);
  const int64_t usual = std::min(call.graph.utterances, 2 * mean), limit = static_cast<int64_t>(shared_limit());
  call.shift = kWidestShift;
  while (call.shift > 0 && int64_t{1} << (call.shift - 1) >= call.width) --call.shift;
  const int narrow = std::min(call.shift, kSectorShift);
  const int64_t budget =
      std::max(std::min(call.bytes(usual, call.shift), kShare), std::min(call.bytes(usual, narrow), limit));
  for (int shift = 0; shift <= kWidestShift; ++shift) {
    int64_t fits = 0, too_long = call.graph.utterances + 1;
    while (fits + 1 < too_long) {
      const int64_t middle = fits + (too_long - fits) / 2;
      (call.bytes(middle, shift) <= budget ? fits : too_long) = middle;
    }
    call.longest[shift] = fits;
  }
  return budget;
}

template <Kind kKind, int kM, typename T>
void run(Call<T> call, const Tensor& from, Tensor& out, cudaStream_t stream) {
  using A = acc_t<T>;
  const int64_t budget = plan(call), N = call.graph.utterances;
  const int64_t slices = call.longest[0] < N ? ceil_div(call.width, int64_t{1} << call.shift) : 0;
  const auto room = [&](int64_t count, ScalarType type) { return empty_tensor(out, {count}, type); };
  const ScalarType acc = acc_dtype(out.scalar_type());
  Tensor scratch = room(slices > 0 ? call.buffers() * out.numel() : 0, acc);
  Tensor rows = room(slices * N * static_cast<int64_t>(sizeof(Row<A, int64_t>)), ScalarType::Byte);
  Tensor scales = room(slices * N * 2 * call.gated_modalities(), acc);
  Tensor senders = room(slices * N * call.gated_modalities(), ScalarType::Long);
  if (slices > 0) {
    call.scratch = scratch.mutable_data_ptr<A>();
    call.rows = static_cast<Row<A, int64_t>*>(rows.mutable_data_ptr());
    call.scales = scales.mutable_data_ptr<A>();
    call.senders = senders.mutable_data_ptr<int64_t>();
  }
  const dim3 grid(static_cast<unsigned>(std::min(call.graph.conversations, kMaxBlocks)),
                  static_cast<unsigned>(std::min<int64_t>(call.tasks_of_conversation(), 65535)));
  launch(conversations_kernel<kKind, kM, T>, grid, dim3(kThreads), static_cast<size_t>(budget), stream, call,
         from.const_data_ptr<T>(), out.mutable_data_ptr<T>());
}

bool nothing_to_do(const WindowSizes& s, const Tensor& out) { return out.numel() == 0 || s.conversations == 0; }

void propagate(const char* op, const PropagateCall& given, Direction direction, const Tensor& x, Tensor& out) {
  if (nothing_to_do(given.sizes, out)) return;
  const OnDeviceOf device(x);
  const Neighbours graph = neighbours(given.sizes, given.windows, given.gate);
  dispatch_floating(x.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const A alpha = static_cast<A>(given.alpha);
    const A others = graph.modalities > 1 ? (1 - alpha) / static_cast<A>(graph.modalities - 1) : A(0);
    const auto run_kind = [&](auto forward, auto modalities) {
      constexpr int kM = decltype(modalities)::value;
      constexpr Kind kKind = decltype(forward)::value ? Kind::kPropagate : Kind::kPropagateGradient;
      run<kKind, kM>(Call<T>{graph, given.sizes.width, given.steps, headroom<A>(graph), alpha, others,
                             given.send == Send::kNever, kM == 0 || !graph.include_self},
                     x, out, device.stream);
    };
    const auto run_direction = [&](auto modalities) {
      direction == Direction::kForward ? run_kind(std::true_type{}, modalities)
                                       : run_kind(std::false_type{}, modalities);
    };
    graph.modalities == 3 ? run_direction(std::integral_constant<int, 3>{})
                          : run_direction(std::integral_constant<int, 0>{});
  });
}

void window_mean(const char* op, const WindowMeanCall& given, Direction direction, const Tensor& h, Tensor& out) {
  if (nothing_to_do(given.sizes, out)) return;
  const OnDeviceOf device(h);
  const Neighbours graph = neighbours(given.sizes, given.windows, given.gate);
  dispatch_floating(h.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Call<T> call{graph, given.sizes.width, 1, headroom<acc_t<T>>(graph), 0, 0, true, !graph.include_self};
    direction == Direction::kForward ? run<Kind::kWindowMean, 0>(call, h, out, device.stream)
                                     : run<Kind::kWindowMeanGradient, 0>(call, h, out, device.stream);
  });
}

void modality_mean(const char* op, const ModalityMeanCall& call, Direction direction, const Tensor& h, Tensor& out) {
  if (out.numel() == 0) return;
  const OnDeviceOf device(h);
  const WindowSizes& s = call.sizes;
  dispatch_floating(h.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const T* from = h.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const bool wide = can_vectorise<A>(s.width, {from, to});
    const Lanes lanes(s.width, wide ? kPer16<A> : 1);
    const auto run_kernel = [&](auto kernel) {
      launch(kernel, grid_for(s.utterances * lanes.count(), kThreads), dim3(kThreads), 0, device.stream,
             data_or_null<bool>(call.gate), from, to, s.utterances, static_cast<int>(s.modalities), s.width, lanes);
    };
    if (direction == Direction::kForward)
      run_kernel(wide ? modality_mean_kernel<true, kPer16<A>, T> : modality_mean_kernel<true, 1, T>);
    else
      run_kernel(wide ? modality_mean_kernel<false, kPer16<A>, T> : modality_mean_kernel<false, 1, T>);
  });
}

using Operators = PropagationOperators<propagate, window_mean, modality_mean>;

}  // namespace
}  // namespace msacore::propagation::cuda

MSACORE_CUDA_LIBRARY(m) {
  using msacore::propagation::Direction;
  using msacore::propagation::cuda::Operators;
  m.impl("propagate", TORCH_BOX(&Operators::propagate<Direction::kForward>));
  m.impl("propagate_backward", TORCH_BOX(&Operators::propagate<Direction::kBackward>));
  m.impl("window_mean", TORCH_BOX(&Operators::window_mean<Direction::kForward>));
  m.impl("window_mean_backward", TORCH_BOX(&Operators::window_mean<Direction::kBackward>));
  m.impl("modality_mean", TORCH_BOX(&Operators::modality_mean<Direction::kForward>));
  m.impl("modality_mean_backward", TORCH_BOX(&Operators::modality_mean<Direction::kBackward>));
}
