// The operators on CSR graphs, on every device: their arguments, and the order in which half-steps
// h ← (1-α) A h + α x go through their graphs.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "core/optional.h"

namespace msacore::graph_propagation {

struct Graph {
  Tensor rowptr, col;
  OptionalTensor weight;
};

struct GraphSizes {
  int64_t nodes, width, edges;
};

inline GraphSizes check_graph(const char* op, const Tensor& x, const Graph& graph, const std::string& prefix = "") {
  check_floating(x, op, "x");
  check_shape(x, op, "x", {-1, -1}, "[n, d]");
  check_dtype(graph.rowptr, op, prefix + "rowptr", ScalarType::Long);
  check_shape(graph.rowptr, op, prefix + "rowptr", {x.size(0) + 1}, "[n + 1]");
  check_device(graph.rowptr, op, prefix + "rowptr", x);
  check_dtype(graph.col, op, prefix + "col", ScalarType::Long);
  check_shape(graph.col, op, prefix + "col", {-1}, "[E]");
  check_device(graph.col, op, prefix + "col", x);
  if (graph.weight) {
    check_dtype(*graph.weight, op, prefix + "weight", x.scalar_type());
    check_shape(*graph.weight, op, prefix + "weight", {graph.col.size(0)}, "[E]");
    check_device(*graph.weight, op, prefix + "weight", x);
  }
  return {x.size(0), x.size(1), graph.col.size(0)};
}

// `Input` is a graph argument, checked and made ready for a device: Input(op, prefix of its names, x, graph).
template <typename Input>
using HalfStepsOf = std::vector<const Input*>;

// The three graphs of the alternation and their order; without `first_intra` the first step uses `intra` too.
template <typename Input>
struct AlternationOf {
  Input intra, inter;
  std::optional<Input> first;

  AlternationOf(const char* op, const Tensor& x, const Graph& intra_, const Graph& inter_,
                const OptionalTensor& first_rowptr, const OptionalTensor& first_col, const OptionalTensor& first_weight)
      : intra(op, "intra_", x, intra_), inter(op, "inter_", x, inter_) {
    check(first_rowptr.has_value() == first_col.has_value() && (first_rowptr || !first_weight), op,
          "expected `first_intra_rowptr` and `first_intra_col` together or not at all, got one of them");
    if (first_rowptr) first.emplace(op, "first_intra_", x, Graph{*first_rowptr, *first_col, first_weight});
  }

  std::vector<const Input*> graphs() const {
    return first ? std::vector<const Input*>{&intra, &inter, &*first} : std::vector<const Input*>{&intra, &inter};
  }
  HalfStepsOf<Input> half_steps(int64_t steps) const {
    HalfStepsOf<Input> out;
    for (int64_t k = 0; k < steps; ++k) {
      out.push_back(k == 0 && first ? &*first : &intra);
      out.push_back(&inter);
    }
    return out;
  }
};

template <typename Input>
using Forward = Tensor (*)(const char* op, const Tensor& x, const HalfStepsOf<Input>& half_steps, double alpha);
// The gradients of x and of the weights of `graphs`; those are empty where not wanted.
template <typename Input>
using Backward = std::vector<Tensor> (*)(const char* op, const Tensor& grad_out, const Tensor& x,
                                         const std::vector<const Input*>& graphs, const HalfStepsOf<Input>& half_steps,
                                         double alpha, bool weight_grad);

// The operators of a device, from what it does with half-steps.
template <typename Input, Forward<Input> forward, Backward<Input> backward>
struct GraphOperators {
  static Tensor graph_propagate(const Tensor& x, const Tensor& rowptr, const Tensor& col, const OptionalTensor& weight,
                                int64_t steps, double alpha) {
    constexpr const char* op = "graph_propagate";
    check_steps(op, steps, alpha);
    const Input graph(op, "", x, {rowptr, col, weight});
    return forward(op, x, HalfStepsOf<Input>(steps, &graph), alpha);
  }

  static std::tuple<Tensor, Tensor> graph_propagate_backward(const Tensor& grad_out, const Tensor& x,
                                                             const Tensor& rowptr, const Tensor& col,
                                                             const OptionalTensor& weight, int64_t steps, double alpha,
                                                             bool weight_grad) {
    constexpr const char* op = "graph_propagate_backward";
    check_steps(op, steps, alpha);
    const Input graph(op, "", x, {rowptr, col, weight});
    const std::vector<Tensor> grads =
        backward(op, grad_out, x, {&graph}, HalfStepsOf<Input>(steps, &graph), alpha, weight_grad);
    return {grads[0], grads[1]};
  }

  static Tensor alternating_graph_propagate(const Tensor& x, const Tensor& intra_rowptr, const Tensor& intra_col,
                                            const OptionalTensor& intra_weight, const Tensor& inter_rowptr,
                                            const Tensor& inter_col, const OptionalTensor& inter_weight,
                                            const OptionalTensor& first_rowptr, const OptionalTensor& first_col,
                                            const OptionalTensor& first_weight, int64_t steps, double alpha) {
    constexpr const char* op = "alternating_graph_propagate";
    check_steps(op, steps, alpha);
    const AlternationOf<Input> alternation(op, x, {intra_rowptr, intra_col, intra_weight},
                                           {inter_rowptr, inter_col, inter_weight}, first_rowptr, first_col,
                                           first_weight);
    return forward(op, x, alternation.half_steps(steps), alpha);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> alternating_graph_propagate_backward(
      const Tensor& grad_out, const Tensor& x, const Tensor& intra_rowptr, const Tensor& intra_col,
      const OptionalTensor& intra_weight, const Tensor& inter_rowptr, const Tensor& inter_col,
      const OptionalTensor& inter_weight, const OptionalTensor& first_rowptr, const OptionalTensor& first_col,
      const OptionalTensor& first_weight, int64_t steps, double alpha, bool weight_grad) {
    constexpr const char* op = "alternating_graph_propagate_backward";
    check_steps(op, steps, alpha);
    const AlternationOf<Input> alternation(op, x, {intra_rowptr, intra_col, intra_weight},
                                           {inter_rowptr, inter_col, inter_weight}, first_rowptr, first_col,
                                           first_weight);
    std::vector<Tensor> grads =
        backward(op, grad_out, x, alternation.graphs(), alternation.half_steps(steps), alpha, weight_grad);
    if (!alternation.first) grads.push_back(torch::stable::new_empty(x, {0}));
    return {grads[0], grads[1], grads[2], grads[3]};
  }
};

}  // namespace msacore::graph_propagation
