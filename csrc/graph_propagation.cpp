// Propagation over CSR graphs on the CPU. A thread owns target nodes, so sums have one fixed order.
#include "propagation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/simd.h"

namespace msacore::propagation {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should have at least

int64_t rows_per_task(int64_t work_per_row) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work_per_row));
}

void check_values(const char* op, const int64_t* rowptr, const int64_t* col, const GraphSizes& s) {
  check(rowptr[0] == 0, op, "expected `rowptr[0]` to be 0, got ", rowptr[0]);
  check(rowptr[s.nodes] == s.edges, op, "expected `rowptr[-1]` to be E = ", s.edges, ", got ", rowptr[s.nodes]);
  for (int64_t i = 0; i < s.nodes; ++i)
    check(rowptr[i] <= rowptr[i + 1], op, "expected `rowptr` to be non-decreasing, got ", rowptr[i], " before ",
          rowptr[i + 1], " at position ", i);
  for (int64_t e = 0; e < s.edges; ++e)
    check(col[e] >= 0 && col[e] < s.nodes, op, "expected `col` in [0, n = ", s.nodes, "), got ", col[e],
          " at position ", e);
}

// out[i] = keep · Σ_e weight[e] · h[col[e]] + alpha · x[i] for rows begin … end
template <typename T, typename A>
MSACORE_SIMD void spmm_rows(const int64_t* __restrict__ rowptr, const int64_t* __restrict__ col,
                            const T* __restrict__ weight, const A* __restrict__ h, const T* __restrict__ x,
                            A* __restrict__ out, int64_t begin, int64_t end, int64_t width, A keep, A alpha) {
  for (int64_t i = begin; i < end; ++i) {
    A* row = out + i * width;
    for (int64_t c = 0; c < width; ++c) row[c] = 0;
    for (int64_t e = rowptr[i]; e < rowptr[i + 1]; ++e) {
      const A w = weight ? static_cast<A>(weight[e]) : A(1);
      const A* source = h + col[e] * width;
      for (int64_t c = 0; c < width; ++c) row[c] += w * source[c];
    }
    for (int64_t c = 0; c < width; ++c) row[c] = keep * row[c] + alpha * static_cast<A>(x[i * width + c]);
  }
}

template <typename From, typename To>
MSACORE_SIMD void convert_range(const From* __restrict__ from, To* __restrict__ to, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) to[i] = static_cast<To>(from[i]);
}

template <typename From, typename To>
void convert(const From* from, To* to, int64_t count) {
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t b, int64_t e) { convert_range(from, to, b, e); });
}

template <typename A>
MSACORE_SIMD void add_scaled_range(A* __restrict__ to, const A* __restrict__ from, A scale, int64_t begin,
                                   int64_t end) {
  for (int64_t i = begin; i < end; ++i) to[i] += scale * from[i];
}

// grad_weight[e] += keep · <grad[i], h[col[e]]> for the edges of rows begin … end
template <typename A>
MSACORE_SIMD void edge_dots(const int64_t* __restrict__ rowptr, const int64_t* __restrict__ col,
                            const A* __restrict__ grad, const A* __restrict__ h, A* __restrict__ grad_weight,
                            int64_t begin, int64_t end, int64_t width, A keep) {
  for (int64_t i = begin; i < end; ++i) {
    const A* g = grad + i * width;
    for (int64_t e = rowptr[i]; e < rowptr[i + 1]; ++e) {
      const A* source = h + col[e] * width;
      A dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t c = 0; c < width; ++c) dot += g[c] * source[c];
      grad_weight[e] += keep * dot;
    }
  }
}

template <typename T>
struct Csr {
  const int64_t *rowptr, *col;
  const T* weight;

  template <typename A>
  void propagate(const A* h, const T* x, A* out, const GraphSizes& s, A keep, A alpha) const {
    const int64_t grain = rows_per_task(s.width * (1 + s.edges / std::max<int64_t>(1, s.nodes)));
    torch::stable::parallel_for(0, s.nodes, grain, [&](int64_t b, int64_t e) {
      spmm_rows(rowptr, col, weight, h, x, out, b, e, s.width, keep, alpha);
    });
  }
};

// The transposed graph: gradients gather along it too, so that they need no atomics.
template <typename T>
struct Transposed {
  std::vector<int64_t> rowptr, col;
  std::vector<T> weight;

  Transposed(const Csr<T>& graph, const GraphSizes& s) : rowptr(s.nodes + 1, 0), col(s.edges), weight(s.edges, T(1)) {
    for (int64_t e = 0; e < s.edges; ++e) ++rowptr[graph.col[e] + 1];
    for (int64_t i = 0; i < s.nodes; ++i) rowptr[i + 1] += rowptr[i];
    std::vector<int64_t> next(rowptr.begin(), rowptr.end() - 1);
    for (int64_t i = 0; i < s.nodes; ++i)
      for (int64_t e = graph.rowptr[i]; e < graph.rowptr[i + 1]; ++e) {
        const int64_t slot = next[graph.col[e]]++;
        col[slot] = i;
        if (graph.weight) weight[slot] = graph.weight[e];
      }
  }
  Csr<T> view() const { return {rowptr.data(), col.data(), weight.data()}; }
};

template <typename T>
Csr<T> csr_of(const Graph& graph) {
  return {graph.rowptr.const_data_ptr<int64_t>(), graph.col.const_data_ptr<int64_t>(),
          graph.weight ? graph.weight->const_data_ptr<T>() : nullptr};
}

Graph contiguous(const Graph& graph) {
  Graph out{torch::stable::contiguous(graph.rowptr), torch::stable::contiguous(graph.col), std::nullopt};
  if (graph.weight) out.weight = torch::stable::contiguous(*graph.weight);
  return out;
}

template <typename T>
void forward(const Graph& graph, const T* x, T* out, const GraphSizes& s, int64_t steps, acc_t<T> alpha) {
  using A = acc_t<T>;
  const int64_t count = s.nodes * s.width;
  const Csr<T> csr = csr_of<T>(graph);
  std::vector<A> h(count), next(count);
  convert(x, h.data(), count);
  for (int64_t k = 0; k < steps; ++k) {
    csr.propagate(h.data(), x, next.data(), s, 1 - alpha, alpha);
    h.swap(next);
  }
  convert(h.data(), out, count);
}

Tensor graph_propagate_cpu(const Tensor& x_, const Tensor& rowptr, const Tensor& col,
                           const std::optional<Tensor>& weight, int64_t steps, double alpha) {
  constexpr const char* op = "graph_propagate";
  check_steps(op, steps, alpha);
  const GraphSizes s = check_graph(op, x_, {rowptr, col, weight});
  const Tensor x = torch::stable::contiguous(x_);
  const Graph graph = contiguous({rowptr, col, weight});
  check_values(op, graph.rowptr.const_data_ptr<int64_t>(), graph.col.const_data_ptr<int64_t>(), s);
  Tensor out = torch::stable::new_empty(x, {s.nodes, s.width});
  if (out.numel() == 0) return out;
  dispatch_floating(x.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    forward<T>(graph, x.const_data_ptr<T>(), out.mutable_data_ptr<T>(), s, steps, static_cast<acc_t<T>>(alpha));
  });
  return out;
}

// With Λ = dL/dH_K and K steps of H ← (1-α) A H + α x: dx += α Λ, dA_e += (1-α) <Λ_i, H_k,col>, Λ ← (1-α) Aᵀ Λ; end dx
// += Λ.
template <typename T>
void backward(const T* grad_out, const Graph& graph, const T* x, T* grad_x, T* grad_weight, const GraphSizes& s,
              int64_t steps, acc_t<T> alpha) {
  using A = acc_t<T>;
  const int64_t count = s.nodes * s.width;
  const A keep = 1 - alpha;
  const Csr<T> csr = csr_of<T>(graph);
  // The states H_0 … H_{K-1} are needed for the edge weights only, and recomputed rather than kept by the forward pass.
  std::vector<std::vector<A>> states;
  std::vector<A> weight_sum;
  if (grad_weight) {
    weight_sum.assign(s.edges, 0);
    for (int64_t k = 0; k < steps; ++k) {
      states.emplace_back(count);
      k == 0 ? convert(x, states[0].data(), count)
             : csr.propagate(states[k - 1].data(), x, states[k].data(), s, keep, alpha);
    }
  }
  const Transposed<T> transposed(csr, s);
  const std::vector<T> no_teleport(count, T(0));
  std::vector<A> grad(count), next(count), sum(count, 0);
  convert(grad_out, grad.data(), count);
  for (int64_t k = steps - 1; k >= 0; --k) {
    if (grad_weight)
      torch::stable::parallel_for(0, s.nodes, rows_per_task(s.width), [&](int64_t b, int64_t e) {
        edge_dots(csr.rowptr, csr.col, grad.data(), states[k].data(), weight_sum.data(), b, e, s.width, keep);
      });
    torch::stable::parallel_for(0, count, kGrain,
                                [&](int64_t b, int64_t e) { add_scaled_range(sum.data(), grad.data(), alpha, b, e); });
    transposed.view().propagate(grad.data(), no_teleport.data(), next.data(), s, keep, A(0));
    grad.swap(next);
  }
  add_scaled_range(sum.data(), grad.data(), A(1), 0, count);
  convert(sum.data(), grad_x, count);
  if (grad_weight) convert(weight_sum.data(), grad_weight, s.edges);
}

std::tuple<Tensor, Tensor> graph_propagate_backward_cpu(const Tensor& grad_out_, const Tensor& x_, const Tensor& rowptr,
                                                        const Tensor& col, const std::optional<Tensor>& weight,
                                                        int64_t steps, double alpha) {
  constexpr const char* op = "graph_propagate_backward";
  check_steps(op, steps, alpha);
  const GraphSizes s = check_graph(op, x_, {rowptr, col, weight});
  check_shape(grad_out_, op, "grad_out", {s.nodes, s.width}, "[n, d]");
  check_dtype(grad_out_, op, "grad_out", x_.scalar_type());
  const Tensor x = torch::stable::contiguous(x_), grad_out = torch::stable::contiguous(grad_out_);
  const Graph graph = contiguous({rowptr, col, weight});
  check_values(op, graph.rowptr.const_data_ptr<int64_t>(), graph.col.const_data_ptr<int64_t>(), s);
  Tensor grad_x = torch::stable::new_empty(x, {s.nodes, s.width});
  Tensor grad_weight = torch::stable::new_empty(x, {weight ? s.edges : 0});
  dispatch_floating(x.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    backward<T>(grad_out.const_data_ptr<T>(), graph, x.const_data_ptr<T>(), grad_x.mutable_data_ptr<T>(),
                weight ? grad_weight.mutable_data_ptr<T>() : nullptr, s, steps, static_cast<acc_t<T>>(alpha));
  });
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace msacore::propagation

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def("graph_propagate(Tensor x, Tensor rowptr, Tensor col, Tensor? weight, *, int steps, float alpha) -> Tensor");
  m.def(
      "graph_propagate_backward(Tensor grad_out, Tensor x, Tensor rowptr, Tensor col, Tensor? weight, *, int steps, "
      "float alpha) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  m.impl("graph_propagate", TORCH_BOX(&msacore::propagation::graph_propagate_cpu));
  m.impl("graph_propagate_backward", TORCH_BOX(&msacore::propagation::graph_propagate_backward_cpu));
}
