// Message propagation: what the operators accept, on every device.
#pragma once
#include <optional>

#include "common/check.h"

namespace msacore::propagation {

struct Graph {
  Tensor rowptr, col;
  std::optional<Tensor> weight;
};

struct GraphSizes {
  int64_t nodes, width, edges;
};

inline void check_steps(const char* op, int64_t steps, double alpha) {
  check(steps >= 0, op, "expected `steps` to be at least 0, got ", steps);
  check(alpha >= 0 && alpha <= 1, op, "expected `alpha` in [0, 1], got ", alpha);
}

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

}  // namespace msacore::propagation
