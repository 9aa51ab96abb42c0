// Propagation over CSR graphs on CUDA: checks, scratch memory and launches.
#include <map>
#include <tuple>
#include <vector>

#include "cuda/registration.cuh"
#include "cuda/sort.cuh"
#include "graph_propagation/graph_propagation.h"
#include "graph_propagation/graph_propagation_kernels.cuh"

namespace msacore::graph_propagation::cuda {
using namespace msacore::cuda;
namespace {

template <typename T>
Csr<T> csr_of(const Graph& graph, const GraphSizes& s) {
  return {graph.rowptr.const_data_ptr<int64_t>(),
          graph.col.const_data_ptr<int64_t>(),
          graph.weight ? graph.weight->const_data_ptr<T>() : nullptr,
          s.rows,
          s.nodes,
          s.edges,
          s.heads,
          s.head_width()};
}

template <typename From, typename To>
void convert(const From* from, To* to, int64_t count, cudaStream_t stream) {
  launch(convert_kernel<From, To>, grid_for(count, kGraphThreads), dim3(kGraphThreads), 0, stream, from, to, count);
}

// Vectors of columns must not reach from one head into the next.
template <typename T>
bool can_vectorise(const Csr<T>& graph, std::initializer_list<const void*> pointers) {
  return msacore::cuda::can_vectorise<acc_t<T>>(graph.head_width, pointers);
}

// One step on `stream`, for any graph and any types of the states.
template <typename T, typename In, typename Out>
void step(const Csr<T>& graph, const In* h, const T* x, Out* out, int64_t width, acc_t<T> alpha, cudaStream_t stream) {
  constexpr int kVector = kPer16<acc_t<T>>;
  const bool wide = can_vectorise(graph, {h, x, out});
  const Lanes lanes(width, wide ? kVector : 1);
  launch(wide ? step_kernel<kVector, T, In, Out> : step_kernel<1, T, In, Out>,
         grid_for(graph.rows * lanes.count(), kGraphThreads), dim3(kGraphThreads), 0, stream, graph, h, x, out, width,
         lanes, 1 - alpha, alpha);
}

template <typename T, typename In, typename Out>
void backward_step(const Csr<T>& transposed, const In* grad, const acc_t<T>* sum_before, Out* sum, acc_t<T>* next,
                   int64_t width, acc_t<T> alpha, bool last, cudaStream_t stream) {
  constexpr int kVector = kPer16<acc_t<T>>;
  const bool wide = can_vectorise(transposed, {grad, sum_before, sum, next});
  const Lanes lanes(width, wide ? kVector : 1);
  launch(wide ? backward_step_kernel<kVector, T, In, Out> : backward_step_kernel<1, T, In, Out>,
         grid_for(transposed.rows * lanes.count(), kGraphThreads), dim3(kGraphThreads), 0, stream, transposed, grad,
         sum_before, sum, next, width, lanes, 1 - alpha, alpha, last ? acc_t<T>(1) : alpha);
}

template <typename T, typename In, typename State>
void edge_dots(const Csr<T>& graph, const In* grad, const State* h, acc_t<T>* weight_sum, int64_t width, acc_t<T> alpha,
               cudaStream_t stream) {
  constexpr int kVector = kPer16<acc_t<T>>;
  const bool wide = can_vectorise(graph, {grad, h});
  const Lanes lanes(graph.head_width, wide ? kVector : 1);
  launch(wide ? edge_dots_kernel<kVector, T, In, State> : edge_dots_kernel<1, T, In, State>,
         grid_for(graph.rows * lanes.count(), kGraphThreads), dim3(kGraphThreads), 0, stream, graph, grad, h,
         weight_sum, width, lanes, 1 - alpha);
}

// A graph argument, checked and contiguous.
struct Input {
  GraphSizes sizes;
  Graph graph;

  Input(const char* op, const std::string& prefix, const Tensor& x, const Graph& given, Accepted accepted)
      : sizes(check_graph(op, x, given, prefix, accepted)),
        graph{torch::stable::contiguous(given.rowptr), torch::stable::contiguous(given.col), std::nullopt} {
    if (given.weight) graph.weight = torch::stable::contiguous(*given.weight);
  }

  template <typename T>
  Csr<T> csr() const {
    return csr_of<T>(graph, sizes);
  }
};

using HalfSteps = HalfStepsOf<Input>;

// Aᵀ, so that gradients gather too. The stable sort keeps the edges of a source in their order, so that sums are always
// the same.
template <typename T>
Graph transpose(const Graph& graph, const GraphSizes& s, cudaStream_t stream) {
  const Tensor edge = sorted_positions(graph.col, s.nodes, stream);
  Graph out{empty_tensor(graph.rowptr, {s.nodes + 1}), empty_tensor(graph.col, {s.edges}), std::nullopt};
  if (graph.weight) out.weight = empty_tensor(*graph.weight, {s.edges, s.heads});
  launch(transpose_kernel<T>, grid_for(std::max(s.nodes + 1, s.edges), kGraphThreads), dim3(kGraphThreads), 0, stream,
         csr_of<T>(graph, s), edge.const_data_ptr<int64_t>(), out.rowptr.mutable_data_ptr<int64_t>(),
         out.col.mutable_data_ptr<int64_t>(), out.weight ? out.weight->mutable_data_ptr<T>() : nullptr);
  return out;
}

// States between the steps are kept in the accumulation type: `count` of them, [count, nodes, width].
template <typename T>
Tensor states_like(const Tensor& x, int64_t count, const GraphSizes& s) {
  return empty_tensor(x, {count, s.nodes, s.width}, acc_dtype(x.scalar_type()));
}

template <typename T>
void forward(const HalfSteps& half_steps, const T* x, Tensor& out, acc_t<T> alpha, cudaStream_t stream) {
  using A = acc_t<T>;
  const GraphSizes& s = half_steps[0].sizes;
  const int64_t steps = half_steps.count;
  T* result = out.mutable_data_ptr<T>();
  const auto graph = [&](int64_t k) { return half_steps[k].template csr<T>(); };
  if (steps == 1) return step(graph(0), x, x, result, s.width, alpha, stream);
  Tensor states = states_like<T>(out, std::min<int64_t>(steps - 1, 2), s);
  const auto state = [&](int64_t k) { return states.mutable_data_ptr<A>() + k % 2 * s.nodes * s.width; };
  step(graph(0), x, x, state(0), s.width, alpha, stream);
  for (int64_t k = 1; k < steps - 1; ++k) {
    step(graph(k), static_cast<const A*>(state(k - 1)), x, state(k), s.width, alpha, stream);
  }
  step(graph(steps - 1), static_cast<const A*>(state(steps - 2)), x, result, s.width, alpha, stream);
}

Tensor forward(const char* op, const Tensor& x_, const HalfSteps& half_steps, double alpha) {
  if (half_steps.count == 0) return torch::stable::clone(torch::stable::contiguous(x_));
  const int64_t rows = half_steps[0].sizes.rows;
  if (x_.numel() == 0) return zero_rows(x_, rows, x_.scalar_type());
  const OnDeviceOf device(x_);
  const Tensor x = torch::stable::contiguous(x_);
  Tensor out = new_rows(x, rows, x.scalar_type());
  if (out.numel() == 0) return out;
  dispatch_floating(x.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    forward<T>(half_steps, x.const_data_ptr<T>(), out, static_cast<acc_t<T>>(alpha), device.stream);
  });
  return out;
}

// What the backward half-steps of a graph share: Aᵀ, and where its weights' gradients add up (`dots` is null where they
// are not wanted).
template <typename T>
struct Adjoint {
  GraphSizes sizes;  // of the transposed graph
  Graph transposed;
  Tensor weight_sum;

  Adjoint(const Input& input, const Tensor& grad_weight, cudaStream_t stream)
      : sizes{input.sizes.nodes, input.sizes.rows, input.sizes.width, input.sizes.edges, input.sizes.heads},
        transposed(transpose<T>(input.graph, input.sizes, stream)),
        weight_sum(torch::stable::new_zeros(grad_weight, {grad_weight.numel()}, acc_dtype(grad_weight.scalar_type()))) {
  }
  Csr<T> csr() const { return csr_of<T>(transposed, sizes); }
  acc_t<T>* dots() { return weight_sum.numel() > 0 ? weight_sum.mutable_data_ptr<acc_t<T>>() : nullptr; }
};

// The formulas are those of the CPU operator (graph_propagation.cpp). The states that the gradients of edge weights
// need are computed again. grads: the gradient of x, then those of the weights of every graph, empty where not wanted.
template <typename T>
void backward(const T* grad_out, const std::vector<const Input*>& graphs, const HalfSteps& half_steps, const T* x,
              std::vector<Tensor>& grads, acc_t<T> alpha, cudaStream_t stream) {
  using A = acc_t<T>;
  const GraphSizes& s = half_steps[0].sizes;
  const int64_t count = s.nodes * s.width, steps = half_steps.count;
  const auto graph = [&](int64_t k) { return half_steps[k].template csr<T>(); };
  std::map<const Input*, Adjoint<T>> adjoints;
  bool weighted = false;
  for (size_t g = 0; g < graphs.size(); ++g) {
    adjoints.try_emplace(graphs[g], *graphs[g], grads[g + 1], stream);
    weighted = weighted || grads[g + 1].numel() > 0;
  }
  Tensor states = states_like<T>(grads[0], weighted ? steps - 1 : 0, s);
  const auto state = [&](int64_t k) { return states.mutable_data_ptr<A>() + (k - 1) * count; };  // k ≥ 1; x is state 0
  for (int64_t k = 1; weighted && k < steps; ++k) {
    k == 1 ? step(graph(0), x, x, state(1), s.width, alpha, stream)
           : step(graph(k - 1), static_cast<const A*>(state(k - 1)), x, state(k), s.width, alpha, stream);
  }
  Tensor scratch = states_like<T>(grads[0], steps > 1 ? 3 : 0, s);
  A* const sum = scratch.mutable_data_ptr<A>();
  A* const sums[2] = {sum + count, sum + 2 * count};

  // `grad` is Λ_k+1, which is of type T in the first step only; the state of k = 0 is of type T too.
  const auto one_step = [&](const auto* grad, int64_t k) {
    Adjoint<T>& adjoint = adjoints.at(&half_steps[k]);
    A* const dots = adjoint.dots();
    if (dots && k == 0) edge_dots(graph(0), grad, x, dots, s.width, alpha, stream);
    if (dots && k > 0) edge_dots(graph(k), grad, static_cast<const A*>(state(k)), dots, s.width, alpha, stream);
    const A* before = k == steps - 1 ? nullptr : sum;
    const Csr<T> transposed = adjoint.csr();
    if (k == 0) {
      backward_step(transposed, grad, before, grads[0].mutable_data_ptr<T>(), static_cast<A*>(nullptr), s.width, alpha,
                    true, stream);
    } else {
      backward_step(transposed, grad, before, sum, sums[k % 2], s.width, alpha, false, stream);
    }
  };
  one_step(grad_out, steps - 1);
  for (int64_t k = steps - 2; k >= 0; --k) one_step(static_cast<const A*>(sums[(k + 1) % 2]), k);
  for (size_t g = 0; g < graphs.size(); ++g) {
    convert(static_cast<const A*>(adjoints.at(graphs[g]).dots()), grads[g + 1].mutable_data_ptr<T>(),
            grads[g + 1].numel(), stream);
  }
}

std::vector<Tensor> backward(const char* op, const Tensor& grad_out_, const Tensor& x_,
                             const std::vector<const Input*>& graphs, const HalfSteps& half_steps, double alpha,
                             bool weight_grad) {
  check_grad_out(op, grad_out_, x_, graphs[0]->sizes.rows);
  const OnDeviceOf device(x_);
  const Tensor x = torch::stable::contiguous(x_), grad_out = torch::stable::contiguous(grad_out_);
  std::vector<Tensor> grads;
  if (half_steps.count == 0)
    grads.push_back(torch::stable::clone(grad_out));
  else if (grad_out.numel() == 0)
    grads.push_back(zero_rows(x, x.size(0), x.scalar_type()));
  else
    grads.push_back(new_rows(x, x.size(0), x.scalar_type()));
  for (const Input* input : graphs)
    grads.push_back(weight_gradient(x, input->sizes, input->graph.weight, weight_grad, x.scalar_type()));
  if (half_steps.count == 0 || x.numel() == 0 || grad_out.numel() == 0) return grads;
  dispatch_floating(x.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    backward<T>(grad_out.const_data_ptr<T>(), graphs, half_steps, x.const_data_ptr<T>(), grads,
                static_cast<acc_t<T>>(alpha), device.stream);
  });
  return grads;
}

using Operators = GraphOperators<Input, forward, backward>;

}  // namespace
}  // namespace msacore::graph_propagation::cuda

MSACORE_CUDA_LIBRARY(m) {
  using namespace msacore::graph_propagation::cuda;
  m.impl("graph_propagate", TORCH_BOX(&Operators::graph_propagate));
  m.impl("graph_propagate_backward", TORCH_BOX(&Operators::graph_propagate_backward));
  m.impl("alternating_graph_propagate", TORCH_BOX(&Operators::alternating_graph_propagate));
  m.impl("alternating_graph_propagate_backward", TORCH_BOX(&Operators::alternating_graph_propagate_backward));
}
