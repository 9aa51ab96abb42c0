// The operators on CSR graphs, on every device: their arguments, and the order in which half-steps
// h ← (1-α) A h + α x go through their graphs.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>
#include <vector>

#include "core/allocate.h"
#include "core/optional.h"

namespace msacore::graph_propagation {

struct Graph {
  Tensor rowptr, col;
  OptionalTensor weight;
};

// A is [rows, nodes]. A row of features has `width` columns, in `heads` parts of equal width with weights of their own;
// where all columns share the weights, `heads` is 1.
struct GraphSizes {
  int64_t rows, nodes, width, edges, heads;

  int64_t head_width() const { return heads > 0 ? width / heads : 0; }
};

// Whether an operator accepts features with heads, and a graph whose targets are not its sources.
struct Accepted {
  bool heads, rectangular;
};

inline GraphSizes check_graph(const char* op, const Tensor& x, const Graph& graph, const std::string& prefix,
                              Accepted accepted) {
  check_floating(x, op, "x");
  const bool heads = accepted.heads && x.dim() == 3;
  heads ? check_shape(x, op, "x", {-1, -1, -1}, "[n, H, d]")
        : check_shape(x, op, "x", {-1, -1}, accepted.heads ? "[n, d] or [n, H, d]" : "[n, d]");
  check_dtype(graph.rowptr, op, prefix + "rowptr", ScalarType::Long);
  accepted.rectangular ? check_shape(graph.rowptr, op, prefix + "rowptr", {-1}, "[m + 1]")
                       : check_shape(graph.rowptr, op, prefix + "rowptr", {x.size(0) + 1}, "[n + 1]");
  check(graph.rowptr.size(0) >= 1, op, "expected `", prefix,
        "rowptr` to have shape [m + 1] with m at least 0, got [0]");
  check_device(graph.rowptr, op, prefix + "rowptr", x);
  check_dtype(graph.col, op, prefix + "col", ScalarType::Long);
  check_shape(graph.col, op, prefix + "col", {-1}, "[E]");
  check_device(graph.col, op, prefix + "col", x);
  const bool per_head = heads && graph.weight && graph.weight->dim() == 2;
  if (graph.weight) {
    check_dtype(*graph.weight, op, prefix + "weight", x.scalar_type());
    if (per_head)
      check_shape(*graph.weight, op, prefix + "weight", {graph.col.size(0), x.size(1)}, "[E, H]");
    else
      check_shape(*graph.weight, op, prefix + "weight", {graph.col.size(0)}, heads ? "[E] or [E, H]" : "[E]");
    check_device(*graph.weight, op, prefix + "weight", x);
  }
  const int64_t width = heads ? x.size(1) * x.size(2) : x.size(1);
  return {graph.rowptr.size(0) - 1, x.size(0), width, graph.col.size(0), per_head ? x.size(1) : 1};
}

// An uninitialised result with as many rows as the graph's targets and the columns of x.
inline Tensor new_rows(const Tensor& x, int64_t rows, ScalarType dtype) {
  return x.dim() == 3 ? empty_tensor(x, {rows, x.size(1), x.size(2)}, dtype)
                      : empty_tensor(x, {rows, x.size(1)}, dtype);
}
inline Tensor zero_rows(const Tensor& x, int64_t rows, ScalarType dtype) {
  return x.dim() == 3 ? torch::stable::new_zeros(x, {rows, x.size(1), x.size(2)}, dtype)
                      : torch::stable::new_zeros(x, {rows, x.size(1)}, dtype);
}
// Zeros for the gradient of a graph's weights; empty where the gradient is not wanted.
inline Tensor weight_gradient(const Tensor& x, const GraphSizes& s, const OptionalTensor& weight, bool wanted,
                              ScalarType dtype) {
  if (!wanted || !weight) return torch::stable::new_zeros(x, {0}, dtype);
  return weight->dim() == 2 ? torch::stable::new_zeros(x, {s.edges, s.heads}, dtype)
                            : torch::stable::new_zeros(x, {s.edges}, dtype);
}
inline void check_grad_out(const char* op, const Tensor& grad_out, const Tensor& x, int64_t rows) {
  x.dim() == 3 ? check_shape(grad_out, op, "grad_out", {rows, x.size(1), x.size(2)}, "[m, H, d]")
               : check_shape(grad_out, op, "grad_out", {rows, x.size(1)}, "[m, d]");
  check_dtype(grad_out, op, "grad_out", x.scalar_type());
  check_device(grad_out, op, "grad_out", x);
}

// The graphs that h goes through: `first`, then `odd` and `even` alternately. `Input` is a graph argument, checked and
// made ready for a device: Input(op, prefix of its names, x, graph, accepted).
template <typename Input>
struct HalfStepsOf {
  const Input *first, *odd, *even;
  int64_t count;

  const Input& operator[](int64_t k) const { return *(k == 0 ? first : k % 2 ? odd : even); }
};

// The three graphs of the alternation and their order; without `first_intra` the first step uses `intra` too.
template <typename Input>
struct AlternationOf {
  Input intra, inter;
  std::optional<Input> first;

  AlternationOf(const char* op, const Tensor& x, const Graph& intra_, const Graph& inter_,
                const OptionalTensor& first_rowptr, const OptionalTensor& first_col, const OptionalTensor& first_weight)
      : intra(op, "intra_", x, intra_, {}), inter(op, "inter_", x, inter_, {}) {
    check(first_rowptr.has_value() == first_col.has_value() && (first_rowptr || !first_weight), op,
          "expected `first_intra_rowptr` and `first_intra_col` together or not at all, got one of them");
    if (first_rowptr) first.emplace(op, "first_intra_", x, Graph{*first_rowptr, *first_col, first_weight}, Accepted{});
  }

  std::vector<const Input*> graphs() const {
    return first ? std::vector<const Input*>{&intra, &inter, &*first} : std::vector<const Input*>{&intra, &inter};
  }
  HalfStepsOf<Input> half_steps(const char* op, int64_t steps) const {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 2;
    check(steps <= kMost, op, "expected `steps` to be at most ", kMost, ", got ", steps);
    return {first ? &*first : &intra, &inter, &intra, 2 * steps};
  }
};

template <typename Input>
using Forward = Tensor (*)(const char* op, const Tensor& x, const HalfStepsOf<Input>& half_steps, double alpha);
// The gradients of x and of the weights of `graphs`; the latter are empty where not wanted.
template <typename Input>
using Backward = std::vector<Tensor> (*)(const char* op, const Tensor& grad_out, const Tensor& x,
                                         const std::vector<const Input*>& graphs, const HalfStepsOf<Input>& half_steps,
                                         double alpha, bool weight_grad);

// The operators of a device, built from what it does with half-steps.
template <typename Input, Forward<Input> forward, Backward<Input> backward>
struct GraphOperators {
  static Tensor graph_propagate(const Tensor& x, const Tensor& rowptr, const Tensor& col, const OptionalTensor& weight,
                                int64_t steps, double alpha) {
    constexpr const char* op = "graph_propagate";
    check_steps(op, steps, alpha);
    const Input graph(op, "", x, {rowptr, col, weight}, {true, steps == 1 && alpha == 0});
    return forward(op, x, {&graph, &graph, &graph, steps}, alpha);
  }

  static std::tuple<Tensor, Tensor> graph_propagate_backward(const Tensor& grad_out, const Tensor& x,
                                                             const Tensor& rowptr, const Tensor& col,
                                                             const OptionalTensor& weight, int64_t steps, double alpha,
                                                             bool weight_grad) {
    constexpr const char* op = "graph_propagate_backward";
    check_steps(op, steps, alpha);
    const Input graph(op, "", x, {rowptr, col, weight}, {true, steps == 1 && alpha == 0});
    const std::vector<Tensor> grads =
        backward(op, grad_out, x, {&graph}, {&graph, &graph, &graph, steps}, alpha, weight_grad);
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
    return forward(op, x, alternation.half_steps(op, steps), alpha);
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
        backward(op, grad_out, x, alternation.graphs(), alternation.half_steps(op, steps), alpha, weight_grad);
    if (!alternation.first) grads.push_back(empty_tensor(x, {0}));
    return {grads[0], grads[1], grads[2], grads[3]};
  }
};

}  // namespace msacore::graph_propagation
