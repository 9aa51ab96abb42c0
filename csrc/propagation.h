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

// Shapes of the window forms; `width` is d.
struct WindowSizes {
  int64_t utterances, modalities, width, conversations;
};

// When missing nodes send; the values of the integer argument `send`.
enum class Send : int64_t { kAfterFill = 0, kNever = 1 };

inline void check_window(const char* op, int64_t past, int64_t future) {
  check(past >= -1 && future >= -1, op, "expected the entries of `window` to be at least -1, got (", past, ", ", future,
        ")");
}

inline Send check_send(const char* op, int64_t send) {
  check(send == 0 || send == 1, op, "expected `send` to be 0 (after_fill) or 1 (never), got ", send);
  return static_cast<Send>(send);
}

// States [N, M, d] and who sends [N, M]; `name` and `gate_name` are what the operator calls them.
inline WindowSizes check_states(const char* op, const std::string& name, const Tensor& h, const std::string& gate_name,
                                const std::optional<Tensor>& gate) {
  check_floating(h, op, name);
  check_shape(h, op, name, {-1, -1, -1}, "[N, M, d]");
  if (gate) {
    check_dtype(*gate, op, gate_name, ScalarType::Bool);
    check_shape(*gate, op, gate_name, {h.size(0), h.size(1)}, "[N, M]");
    check_device(*gate, op, gate_name, h);
  }
  return {h.size(0), h.size(1), h.size(2), 0};
}

inline int64_t check_offsets(const char* op, const Tensor& offsets, const Tensor& like) {
  check_dtype(offsets, op, "offsets", ScalarType::Long);
  check_shape(offsets, op, "offsets", {-1}, "[V + 1]");
  check(offsets.size(0) >= 1, op, "expected `offsets` to have shape [V + 1] with V at least 0, got [0]");
  check_device(offsets, op, "offsets", like);
  return offsets.size(0) - 1;
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
