// Propagation over CSR graphs on CUDA: checks, workspace and launches.
#include <tuple>

#include "common/cuda.cuh"
#include "common/sort.cuh"
#include "propagation.h"
#include "graph_propagation_kernels.cuh"

namespace msacore::propagation {
namespace {

template <typename T>
Csr<T> csr_of(const Graph& graph, const GraphSizes& s) {
  return {graph.rowptr.const_data_ptr<int64_t>(), graph.col.const_data_ptr<int64_t>(),
          graph.weight ? graph.weight->const_data_ptr<T>() : nullptr, s.nodes, s.edges};
}

template <typename From, typename To>
void convert(const From* from, To* to, int64_t count, cudaStream_t stream) {
  launch(convert_kernel<From, To>, grid_for(count, kGraphThreads), dim3(kGraphThreads), 0, stream, from, to, count);
}

// One step on `stream`, for any graph and any types of the states.
template <typename T, typename In, typename Out>
void step(const Csr<T>& graph, const In* h, const T* x, Out* out, int64_t width, acc_t<T> alpha, cudaStream_t stream) {
  constexpr int kVector = kPer16<acc_t<T>>;
  const bool wide = can_vectorise<acc_t<T>>(width, {h, x, out});
  const Lanes lanes(width, wide ? kVector : 1);
  launch(wide ? step_kernel<kVector, T, In, Out> : step_kernel<1, T, In, Out>,
         grid_for(graph.nodes * lanes.count(), kGraphThreads), dim3(kGraphThreads), 0, stream, graph, h, x, out, width,
         lanes, 1 - alpha, alpha);
}

template <typename T, typename In, typename Out>
void backward_step(const Csr<T>& transposed, const In* grad, const acc_t<T>* sum_before, Out* sum, acc_t<T>* next,
                   int64_t width, acc_t<T> alpha, bool last, cudaStream_t stream) {
  constexpr int kVector = kPer16<acc_t<T>>;
  const bool wide = can_vectorise<acc_t<T>>(width, {grad, sum_before, sum, next});
  const Lanes lanes(width, wide ? kVector : 1);
  launch(wide ? backward_step_kernel<kVector, T, In, Out> : backward_step_kernel<1, T, In, Out>,
         grid_for(transposed.nodes * lanes.count(), kGraphThreads), dim3(kGraphThreads), 0, stream, transposed, grad,
         sum_before, sum, next, width, lanes, 1 - alpha, alpha, last ? acc_t<T>(1) : alpha);
}

template <typename T, typename In, typename State>
void edge_dots(const Csr<T>& graph, const In* grad, const State* h, acc_t<T>* weight_sum, int64_t width, acc_t<T> alpha,
               cudaStream_t stream) {
  constexpr int kVector = kPer16<acc_t<T>>;
  const bool wide = can_vectorise<acc_t<T>>(width, {grad, h});
  const Lanes lanes(width, wide ? kVector : 1);
  launch(wide ? edge_dots_kernel<kVector, T, In, State> : edge_dots_kernel<1, T, In, State>,
         grid_for(graph.nodes * lanes.count(), kGraphThreads), dim3(kGraphThreads), 0, stream, graph, grad, h,
         weight_sum, width, lanes, 1 - alpha);
}

Graph contiguous(const Graph& graph) {
  Graph out{torch::stable::contiguous(graph.rowptr), torch::stable::contiguous(graph.col), std::nullopt};
  if (graph.weight) out.weight = torch::stable::contiguous(*graph.weight);
  return out;
}

// Aᵀ, so that gradients gather too. The stable sort keeps the edges of a source in their order: always the same sums.
template <typename T>
Graph transpose(const Graph& graph, const GraphSizes& s, cudaStream_t stream) {
  const Tensor edge = sorted_positions(graph.col, s.nodes, stream);
  Graph out{torch::stable::new_empty(graph.rowptr, {s.nodes + 1}), torch::stable::new_empty(graph.col, {s.edges}),
            std::nullopt};
  if (graph.weight) out.weight = torch::stable::new_empty(*graph.weight, {s.edges});
  launch(transpose_kernel<T>, grid_for(std::max(s.nodes + 1, s.edges), kGraphThreads), dim3(kGraphThreads), 0, stream,
         csr_of<T>(graph, s), edge.const_data_ptr<int64_t>(), out.rowptr.mutable_data_ptr<int64_t>(),
         out.col.mutable_data_ptr<int64_t>(), out.weight ? out.weight->mutable_data_ptr<T>() : nullptr);
  return out;
}

// States between the steps are kept in the accumulation type: `count` of them, [count, nodes, width].
template <typename T>
Tensor states_like(const Tensor& x, int64_t count, const GraphSizes& s) {
  return torch::stable::new_empty(x, {count, s.nodes, s.width}, acc_dtype(x.scalar_type()));
}

template <typename T>
void forward(const Graph& graph, const T* x, Tensor& out, const GraphSizes& s, int64_t steps, acc_t<T> alpha,
             cudaStream_t stream) {
  using A = acc_t<T>;
  T* result = out.mutable_data_ptr<T>();
  const Csr<T> csr = csr_of<T>(graph, s);
  if (steps == 0) return convert(x, result, s.nodes * s.width, stream);
  if (steps == 1) return step(csr, x, x, result, s.width, alpha, stream);
  Tensor states = states_like<T>(out, std::min<int64_t>(steps - 1, 2), s);
  const auto state = [&](int64_t k) { return states.mutable_data_ptr<A>() + k % 2 * s.nodes * s.width; };
  step(csr, x, x, state(0), s.width, alpha, stream);
  for (int64_t k = 1; k < steps - 1; ++k) {
    step(csr, static_cast<const A*>(state(k - 1)), x, state(k), s.width, alpha, stream);
  }
  step(csr, static_cast<const A*>(state(steps - 2)), x, result, s.width, alpha, stream);
}

Tensor graph_propagate_cuda(const Tensor& x_, const Tensor& rowptr, const Tensor& col,
                            const std::optional<Tensor>& weight, int64_t steps, double alpha) {
  constexpr const char* op = "graph_propagate";
  check_steps(op, steps, alpha);
  const GraphSizes s = check_graph(op, x_, {rowptr, col, weight});
  const OnDeviceOf device(x_);
  const Tensor x = torch::stable::contiguous(x_);
  const Graph graph = contiguous({rowptr, col, weight});
  Tensor out = torch::stable::new_empty(x, {s.nodes, s.width});
  if (out.numel() == 0) return out;
  dispatch_floating(x.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    forward<T>(graph, x.const_data_ptr<T>(), out, s, steps, static_cast<acc_t<T>>(alpha), device.stream);
  });
  return out;
}

// The formulas are those of the CPU operator (graph_propagation.cpp). The states that the edge weights need are
// computed again.
template <typename T>
void backward(const T* grad_out, const Graph& graph, const T* x, Tensor& grad_x, Tensor& grad_weight,
              const GraphSizes& s, int64_t steps, acc_t<T> alpha, cudaStream_t stream) {
  using A = acc_t<T>;
  const int64_t count = s.nodes * s.width;
  const Csr<T> csr = csr_of<T>(graph, s);
  const bool weighted = grad_weight.numel() > 0;
  T* result = grad_x.mutable_data_ptr<T>();
  if (steps == 0) {
    convert(grad_out, result, count, stream);
    if (weighted) torch::stable::zero_(grad_weight);
    return;
  }
  Tensor states = states_like<T>(grad_x, weighted ? steps - 1 : 0, s);
  Tensor weight_sum = torch::stable::new_zeros(grad_x, {grad_weight.numel()}, acc_dtype(grad_x.scalar_type()));
  const auto state = [&](int64_t k) { return states.mutable_data_ptr<A>() + (k - 1) * count; };  // k ≥ 1; x is state 0
  for (int64_t k = 1; weighted && k < steps; ++k) {
    k == 1 ? step(csr, x, x, state(1), s.width, alpha, stream)
           : step(csr, static_cast<const A*>(state(k - 1)), x, state(k), s.width, alpha, stream);
  }
  const Graph transposed_graph = transpose<T>(graph, s, stream);
  const Csr<T> transposed = csr_of<T>(transposed_graph, s);
  Tensor workspace = states_like<T>(grad_x, steps > 1 ? 3 : 0, s);
  A* const sum = workspace.mutable_data_ptr<A>();
  A* const sums[2] = {sum + count, sum + 2 * count};

  // `grad` is Λ_k+1: of type T in the first step only, as is the state of k = 0.
  const auto one_step = [&](const auto* grad, int64_t k) {
    A* const dots = weight_sum.mutable_data_ptr<A>();
    if (weighted && k == 0) edge_dots(csr, grad, x, dots, s.width, alpha, stream);
    if (weighted && k > 0) edge_dots(csr, grad, static_cast<const A*>(state(k)), dots, s.width, alpha, stream);
    const A* before = k == steps - 1 ? nullptr : sum;
    if (k == 0) {
      backward_step(transposed, grad, before, result, static_cast<A*>(nullptr), s.width, alpha, true, stream);
    } else {
      backward_step(transposed, grad, before, sum, sums[k % 2], s.width, alpha, false, stream);
    }
  };
  one_step(grad_out, steps - 1);
  for (int64_t k = steps - 2; k >= 0; --k) one_step(static_cast<const A*>(sums[(k + 1) % 2]), k);
  if (weighted) convert(weight_sum.const_data_ptr<A>(), grad_weight.mutable_data_ptr<T>(), s.edges, stream);
}

std::tuple<Tensor, Tensor> graph_propagate_backward_cuda(const Tensor& grad_out_, const Tensor& x_,
                                                         const Tensor& rowptr, const Tensor& col,
                                                         const std::optional<Tensor>& weight, int64_t steps,
                                                         double alpha, bool weight_grad) {
  constexpr const char* op = "graph_propagate_backward";
  check_steps(op, steps, alpha);
  const GraphSizes s = check_graph(op, x_, {rowptr, col, weight});
  check_shape(grad_out_, op, "grad_out", {s.nodes, s.width}, "[n, d]");
  check_dtype(grad_out_, op, "grad_out", x_.scalar_type());
  check_device(grad_out_, op, "grad_out", x_);
  const OnDeviceOf device(x_);
  const Tensor x = torch::stable::contiguous(x_), grad_out = torch::stable::contiguous(grad_out_);
  const Graph graph = contiguous({rowptr, col, weight});
  Tensor grad_x = torch::stable::new_empty(x, {s.nodes, s.width});
  Tensor grad_weight = torch::stable::new_empty(x, {weight && weight_grad ? s.edges : 0});
  if (grad_x.numel() == 0) {
    if (weight_grad) torch::stable::zero_(grad_weight);
    return {grad_x, grad_weight};
  }
  dispatch_floating(x.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    backward<T>(grad_out.const_data_ptr<T>(), graph, x.const_data_ptr<T>(), grad_x, grad_weight, s, steps,
                static_cast<acc_t<T>>(alpha), device.stream);
  });
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace msacore::propagation

MSACORE_CUDA_LIBRARY(m) {
  m.impl("graph_propagate", TORCH_BOX(&msacore::propagation::graph_propagate_cuda));
  m.impl("graph_propagate_backward", TORCH_BOX(&msacore::propagation::graph_propagate_backward_cuda));
}
