// Propagation over conversations on CUDA: checks, workspace and launches.
#include "cuda/registration.cuh"
#include "propagation/propagation.h"
#include "propagation/propagation_kernels.cuh"

namespace msacore::propagation::cuda {
using namespace msacore::cuda;
namespace {

// `side` of a window: -1 is the whole conversation, and nothing reaches further than N.
int64_t reach_of(int64_t side, const WindowSizes& s) { return side < 0 ? s.utterances : std::min(side, s.utterances); }

template <typename A>
Tensor scales(const Neighbours& graph, const Tensor& like, int64_t kinds, A keep, cudaStream_t stream) {
  const int64_t nodes = graph.gate ? graph.utterances * graph.modalities : 0;
  Tensor out = torch::stable::new_empty(like, {kinds, nodes}, acc_dtype(like.scalar_type()));
  A* const intra = out.mutable_data_ptr<A>();
  if (graph.gate) {
    launch(scales_kernel<A>, grid_for(graph.utterances, kThreads), dim3(kThreads), 0, stream, graph, intra,
           kinds > 1 ? intra + nodes : nullptr, keep);
  }
  return out;
}

// Columns and capacity of a block. Lengths are on the device, so the capacity is four times the mean; where that is too
// much for two blocks on a multiprocessor, a block takes fewer columns, but full sectors of memory.
template <typename T>
void plan(Call<T>& call) {
  constexpr int64_t kWidest = 5, kNarrowest = 3;
  const int64_t M = call.graph.modalities, limit = static_cast<int64_t>(shared_limit());
  const int64_t mean = (call.graph.utterances + call.graph.conversations - 1) / call.graph.conversations;
  const int64_t wanted = std::min(call.graph.utterances, 4 * mean) * M;
  const auto bytes = [&](int shift) { return int64_t(3 * sizeof(acc_t<T>)) << shift; };  // of a node
  int shift = kWidest;
  while (shift > 0 && int64_t{1} << (shift - 1) >= call.width) --shift;
  while (shift > kNarrowest && wanted * bytes(shift) > limit / 2) --shift;
  call.shift = shift;
  call.capacity = std::min(wanted, limit / bytes(shift));
}

template <bool kForward, typename T>
void run_propagate(Call<T>& call, const T* from, Tensor& out, cudaStream_t stream) {
  using A = acc_t<T>;
  const int64_t nodes = call.graph.utterances * call.graph.modalities;
  const Tensor scale = scales<A>(call.graph, out, 2, 1 - call.alpha, stream);
  call.intra = scale.const_data_ptr<A>();
  call.inter = call.intra + scale.size(1);
  plan(call);
  const bool all_fit = nodes <= call.capacity;
  Tensor scratch = torch::stable::new_empty(out, {3, all_fit ? 0 : nodes * call.width}, acc_dtype(out.scalar_type()));
  const int64_t tasks = call.graph.conversations * call.slices();
  launch(propagate_kernel<kForward, T>, dim3(std::min(tasks, kMaxBlocks)), dim3(kThreads),
         3 * sizeof(A) * (call.capacity << call.shift), stream, call, from, out.mutable_data_ptr<T>(),
         all_fit ? nullptr : scratch.mutable_data_ptr<A>());
}

template <bool kForward>
Tensor propagate_cuda(const Tensor& x_, const Tensor& offsets_, const OptionalTensor& available_, int64_t past,
                      int64_t future, int64_t steps, double alpha, int64_t send) {
  constexpr const char* op = kForward ? "propagate" : "propagate_backward";
  check_steps(op, steps, alpha);
  check_window(op, past, future);
  const bool never = check_send(op, send) == Send::kNever;
  WindowSizes s = check_states(op, kForward ? "x" : "grad_out", x_, "available", available_);
  s.conversations = check_offsets(op, offsets_, x_);
  const OnDeviceOf device(x_);
  const Tensor x = torch::stable::contiguous(x_), offsets = torch::stable::contiguous(offsets_);
  const OptionalTensor available = contiguous(available_);
  Tensor out = torch::stable::new_empty(x, {s.utterances, s.modalities, s.width});
  if (out.numel() == 0 || s.conversations == 0) return out;
  const Neighbours graph{offsets.const_data_ptr<int64_t>(),
                         data_or_null<bool>(available),
                         s.utterances,
                         s.conversations,
                         reach_of(past, s),
                         reach_of(future, s),
                         static_cast<int>(s.modalities)};
  dispatch_floating(x.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Call<T> call{graph, nullptr, nullptr, s.width, steps, static_cast<acc_t<T>>(alpha), never, 0, 0};
    run_propagate<kForward>(call, x.const_data_ptr<T>(), out, device.stream);
  });
  return out;
}

template <bool kForward>
Tensor window_mean_cuda(const Tensor& h_, const Tensor& offsets_, const OptionalTensor& senders_, int64_t past,
                        int64_t future) {
  constexpr const char* op = kForward ? "window_mean" : "window_mean_backward";
  check_window(op, past, future);
  WindowSizes s = check_states(op, kForward ? "h" : "grad_out", h_, "senders", senders_);
  s.conversations = check_offsets(op, offsets_, h_);
  const OnDeviceOf device(h_);
  const Tensor h = torch::stable::contiguous(h_), offsets = torch::stable::contiguous(offsets_);
  const OptionalTensor senders = contiguous(senders_);
  Tensor out = torch::stable::new_empty(h, {s.utterances, s.modalities, s.width});
  if (out.numel() == 0 || s.conversations == 0) return out;
  const Neighbours graph{offsets.const_data_ptr<int64_t>(),
                         data_or_null<bool>(senders),
                         s.utterances,
                         s.conversations,
                         reach_of(past, s),
                         reach_of(future, s),
                         static_cast<int>(s.modalities)};
  dispatch_floating(h.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const Tensor scale = scales<A>(graph, h, 1, A(1), device.stream);
    const T* from = h.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const bool wide = can_vectorise<A>(s.width, {from, to});
    const Lanes lanes(s.width, wide ? kPer16<A> : 1);
    launch(wide ? window_mean_kernel<kForward, kPer16<A>, T> : window_mean_kernel<kForward, 1, T>,
           grid_for(s.utterances * lanes.count(), kThreads), dim3(kThreads), 0, device.stream, graph,
           senders ? scale.const_data_ptr<A>() : nullptr, from, to, s.width, lanes);
  });
  return out;
}

template <bool kForward>
Tensor modality_mean_cuda(const Tensor& h_, const OptionalTensor& senders_) {
  constexpr const char* op = kForward ? "modality_mean" : "modality_mean_backward";
  const WindowSizes s = check_states(op, kForward ? "h" : "grad_out", h_, "senders", senders_);
  const OnDeviceOf device(h_);
  const Tensor h = torch::stable::contiguous(h_);
  const OptionalTensor senders = contiguous(senders_);
  Tensor out = torch::stable::new_empty(h, {s.utterances, s.modalities, s.width});
  if (out.numel() == 0) return out;
  dispatch_floating(h.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const T* from = h.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const bool wide = can_vectorise<A>(s.width, {from, to});
    const Lanes lanes(s.width, wide ? kPer16<A> : 1);
    launch(wide ? modality_mean_kernel<kForward, kPer16<A>, T> : modality_mean_kernel<kForward, 1, T>,
           grid_for(s.utterances * lanes.count(), kThreads), dim3(kThreads), 0, device.stream,
           data_or_null<bool>(senders), from, to, s.utterances, static_cast<int>(s.modalities), s.width, lanes);
  });
  return out;
}

}  // namespace
}  // namespace msacore::propagation::cuda

MSACORE_CUDA_LIBRARY(m) {
  using namespace msacore::propagation::cuda;
  m.impl("propagate", TORCH_BOX(&propagate_cuda<true>));
  m.impl("propagate_backward", TORCH_BOX(&propagate_cuda<false>));
  m.impl("window_mean", TORCH_BOX(&window_mean_cuda<true>));
  m.impl("window_mean_backward", TORCH_BOX(&window_mean_cuda<false>));
  m.impl("modality_mean", TORCH_BOX(&modality_mean_cuda<true>));
  m.impl("modality_mean_backward", TORCH_BOX(&modality_mean_cuda<false>));
}
