// Propagation over CSR graphs on the CPU. A thread owns target nodes, so sums have one fixed order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "core/dtype.h"
#include "cpu/huge_pages.h"
#include "cpu/interrupt.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "graph_propagation/graph_propagation.h"

namespace msacore::graph_propagation::cpu {
using namespace msacore::cpu;
namespace {

constexpr int64_t kGrain = 32768;  // element updates a thread should have at least
constexpr int64_t kColumns = 64;   // columns of a row that are summed in registers
constexpr int64_t kAhead = 4;      // edges between a row's prefetch and its use

void check_values(const char* op, const std::string& prefix, const int64_t* rowptr, const int64_t* col,
                  const GraphSizes& s) {
  check(rowptr[0] == 0, op, "expected `", prefix, "rowptr[0]` to be 0, got ", rowptr[0]);
  check(rowptr[s.rows] == s.edges, op, "expected `", prefix, "rowptr[-1]` to be E = ", s.edges, ", got ",
        rowptr[s.rows]);
  for (int64_t i = 0; i < s.rows; ++i)
    if (rowptr[i] > rowptr[i + 1])
      fail(op, "expected `", prefix, "rowptr` to be non-decreasing, got ", rowptr[i], " before ", rowptr[i + 1],
           " at position ", i);
  for (int64_t e = 0; e < s.edges; ++e)
    if (col[e] < 0 || col[e] >= s.nodes)
      fail(op, "expected `", prefix, "col` in [0, n = ", s.nodes, "), got ", col[e], " at position ", e);
}

// A graph of `rows` targets; weight [edges, heads], or null for ones.
template <typename A>
struct Csr {
  const int64_t *rowptr, *col;
  const A* weight;
  int64_t rows, edges, heads, head_width;

  int64_t width() const { return heads * head_width; }
};

// out[i] = keep · Σ_e weight[e] · h[col[e]] + alpha · x[i] for rows begin … end; x is not read where alpha is 0.
template <typename A>
MSACORE_SIMD void spmm_rows(const Csr<A>& graph, const A* __restrict__ h, const A* __restrict__ x, A* __restrict__ out,
                            int64_t begin, int64_t end, A keep, A alpha) {
  typedef A Vector __attribute__((vector_size(32), aligned(alignof(A)), may_alias));
  constexpr int64_t kLanes = 32 / sizeof(A), kVectors = kColumns / kLanes;
  const int64_t width = graph.width(), heads = graph.heads;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = graph.rowptr[i], last = graph.rowptr[i + 1];
    A* row = out + i * width;
    const A* kept = x + i * width;
    for (int64_t head = 0; head < heads; ++head) {
      const A* weight = graph.weight ? graph.weight + head : nullptr;
      const int64_t behind = (head + 1) * graph.head_width;
      int64_t c = head * graph.head_width;
      for (; c + kColumns <= behind; c += kColumns) {
        Vector sum[kVectors] = {};
        for (int64_t e = first; e < last; ++e) {
          const A* source = h + graph.col[e] * width + c;
          if (e + kAhead < last) {
            const A* later = h + graph.col[e + kAhead] * width + c;
            for (int64_t line = 0; line < kColumns; line += 64 / sizeof(A)) __builtin_prefetch(later + line);
          }
          const A w = weight ? weight[e * heads] : A(1);
#pragma GCC unroll 16
          for (int64_t v = 0; v < kVectors; ++v) sum[v] += w * *reinterpret_cast<const Vector*>(source + v * kLanes);
        }
#pragma GCC unroll 16
        for (int64_t v = 0; v < kVectors; ++v) {
          Vector result = keep * sum[v];
          if (alpha != 0) result += alpha * *reinterpret_cast<const Vector*>(kept + c + v * kLanes);
          *reinterpret_cast<Vector*>(row + c + v * kLanes) = result;
        }
      }
      for (int64_t k = c; k < behind; ++k) row[k] = 0;
      for (int64_t e = first; c < behind && e < last; ++e) {
        const A w = weight ? weight[e * heads] : A(1);
        const A* source = h + graph.col[e] * width;
        for (int64_t k = c; k < behind; ++k) row[k] += w * source[k];
      }
      for (int64_t k = c; k < behind; ++k) row[k] = alpha != 0 ? keep * row[k] + alpha * kept[k] : keep * row[k];
    }
  }
}

// grad_weight[e] += keep · <grad[i], h[col[e]]>, head by head, for the edges e of rows begin … end
template <typename A>
MSACORE_SIMD void edge_dots(const Csr<A>& graph, const A* __restrict__ grad, const A* __restrict__ h,
                            A* __restrict__ grad_weight, int64_t begin, int64_t end, A keep) {
  const int64_t width = graph.width();
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t e = graph.rowptr[i]; e < graph.rowptr[i + 1]; ++e) {
      for (int64_t head = 0; head < graph.heads; ++head) {
        const A* g = grad + i * width + head * graph.head_width;
        const A* source = h + graph.col[e] * width + head * graph.head_width;
        A dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < graph.head_width; ++c) dot += g[c] * source[c];
        grad_weight[e * graph.heads + head] += keep * dot;
      }
    }
  }
}

template <typename A>
MSACORE_SIMD void add_scaled(A* __restrict__ to, const A* __restrict__ from, A scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) to[i] += scale * from[i];
}

// Runs body(begin, end) over the rows. Rows and edges are divided evenly among threads; a row goes where its first edge
// goes.
template <typename A, typename Body>
void for_rows(const Csr<A>& graph, Body&& body) {
  const auto row_at = [&](int64_t unit) {  // the first row with rowptr[i] + i ≥ unit
    int64_t low = 0, high = graph.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      graph.rowptr[middle] + middle < unit ? low = middle + 1 : high = middle;
    }
    return low;
  };
  const int64_t units = graph.rows + graph.edges;
  parallel_for(0, units, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, graph.width())),
               [&](int64_t b, int64_t e) { body(row_at(b), e == units ? graph.rows : row_at(e)); });
}

// The transposed graph: gradients gather along it too, so that they need no atomics.
template <typename A>
struct Transposed {
  std::vector<int64_t> rowptr, col;
  std::vector<A> weight;
  Csr<A> view;

  Transposed(const Csr<A>& graph, const GraphSizes& s)
      : rowptr(s.nodes + 1, 0), col(s.edges), weight(graph.weight ? s.edges * graph.heads : 0) {
    for (int64_t e = 0; e < s.edges; ++e) ++rowptr[graph.col[e] + 1];
    for (int64_t i = 0; i < s.nodes; ++i) rowptr[i + 1] += rowptr[i];
    std::vector<int64_t> next(rowptr.begin(), rowptr.end() - 1);
    for (int64_t i = 0; i < s.rows; ++i)
      for (int64_t e = graph.rowptr[i]; e < graph.rowptr[i + 1]; ++e) {
        const int64_t slot = next[graph.col[e]]++;
        col[slot] = i;
        for (int64_t head = 0; graph.weight && head < graph.heads; ++head)
          weight[slot * graph.heads + head] = graph.weight[e * graph.heads + head];
      }
    view = {rowptr.data(), col.data(),      weight.empty() ? nullptr : weight.data(), s.nodes, s.edges,
            graph.heads,   graph.head_width};
  }
  Transposed(const Transposed&) = delete;
};

// A graph argument, checked, contiguous, its weights in the accumulation type.
struct Input {
  Graph graph;
  GraphSizes sizes;

  Input(const char* op, const std::string& prefix, const Tensor& x, const Graph& given, Accepted accepted)
      : graph{torch::stable::contiguous(given.rowptr), torch::stable::contiguous(given.col), std::nullopt},
        sizes(check_graph(op, x, given, prefix, accepted)) {
    if (given.weight)
      graph.weight = torch::stable::contiguous(torch::stable::to(*given.weight, acc_dtype(x.scalar_type())));
    check_values(op, prefix, graph.rowptr.const_data_ptr<int64_t>(), graph.col.const_data_ptr<int64_t>(), sizes);
  }

  template <typename A>
  Csr<A> csr() const {
    return {graph.rowptr.const_data_ptr<int64_t>(),
            graph.col.const_data_ptr<int64_t>(),
            graph.weight ? graph.weight->const_data_ptr<A>() : nullptr,
            sizes.rows,
            sizes.edges,
            sizes.heads,
            sizes.head_width()};
  }
  // Approximate number of cache lines that a half-step reads.
  int64_t work() const { return 1 + (sizes.rows + sizes.edges) * sizes.width / 16; }
};

using HalfSteps = HalfStepsOf<Input>;

Tensor accumulation_copy(const Tensor& t) {
  return torch::stable::contiguous(torch::stable::to(t, acc_dtype(t.scalar_type())));
}

template <typename A>
void half_step(const Input& input, const A* h, const A* x, A* out, A keep, A alpha) {
  const Csr<A> graph = input.csr<A>();
  for_rows(graph, [&](int64_t b, int64_t e) { spmm_rows(graph, h, x, out, b, e, keep, alpha); });
}

Tensor forward(const char* op, const Tensor& x_, const HalfSteps& half_steps, double alpha) {
  if (half_steps.count == 0) return torch::stable::clone(torch::stable::contiguous(x_));
  const int64_t rows = half_steps[0].sizes.rows;
  if (x_.numel() == 0) return zero_rows(x_, rows, x_.scalar_type());
  const Tensor x = accumulation_copy(x_);
  Tensor state = on_huge_pages(new_rows(x, rows, x.scalar_type()));
  Tensor other = half_steps.count > 1 ? on_huge_pages(new_rows(x, rows, x.scalar_type())) : state;
  Interruption interruption;
  dispatch_floating(x.scalar_type(), op, [&](auto tag) {
    using A = acc_t<typename decltype(tag)::type>;
    const A a = static_cast<A>(alpha), *start = x.const_data_ptr<A>(), *h = start;
    Interruption::Work work;
    for (int64_t k = 0; k < half_steps.count && !interruption.stop(work, half_steps[k].work()); ++k) {
      half_step(half_steps[k], h, start, state.mutable_data_ptr<A>(), 1 - a, a);
      h = state.const_data_ptr<A>();
      std::swap(state, other);
    }
  });
  interruption.check(op);
  return torch::stable::to(half_steps.count > 1 ? other : state, x_.scalar_type());
}

// With Λ = dL/dh of a half-step's result: dx += α Λ, dA_e += (1-α) <Λ_i, h_col>, then Λ ← (1-α) Aᵀ Λ; at the end dx +=
// Λ. Adds to the entry of `grad_weights` for each graph that has one; the states needed for that are recomputed, not
// kept by forward. With several half-steps the graphs are square.
template <typename A>
void backward(const A* grad_out, const std::vector<const Input*>& graphs, const HalfSteps& half_steps, const A* x,
              A* grad_x, A alpha, const std::map<const Input*, A*>& grad_weights, Interruption& interruption) {
  const GraphSizes& s = half_steps[0].sizes;
  const int64_t count = s.nodes * s.width, steps = half_steps.count;
  const A keep = 1 - alpha;
  Interruption::Work work;
  std::vector<std::unique_ptr<A[]>> states;
  std::map<const Input*, Transposed<A>> transposed;
  for (const Input* input : graphs) transposed.try_emplace(input, input->csr<A>(), input->sizes);
  const auto state = [&](int64_t k) { return k == 0 ? x : states[k - 1].get(); };
  for (int64_t k = 0; !grad_weights.empty() && k + 1 < steps; ++k) {
    if (interruption.stop(work, half_steps[k].work())) return;
    states.emplace_back(new A[count]);
    half_step(half_steps[k], state(k), x, states[k].get(), keep, alpha);
  }
  const int64_t spare = steps > 1 ? count : 0;
  const std::unique_ptr<A[]> buffers[2] = {std::unique_ptr<A[]>(new A[spare]), std::unique_ptr<A[]>(new A[spare])};
  std::vector<A> sum(alpha != 0 ? spare : 0, A(0));  // α (Λ_1 + … + Λ_K)
  const A* grad = grad_out;
  for (int64_t k = steps - 1; k >= 0; --k) {
    const Input& input = half_steps[k];
    if (interruption.stop(work, input.work())) return;
    if (const auto found = grad_weights.find(&input); found != grad_weights.end()) {
      const Csr<A> graph = input.csr<A>();
      for_rows(graph, [&](int64_t b, int64_t e) { edge_dots(graph, grad, state(k), found->second, b, e, keep); });
    }
    if (!sum.empty())
      parallel_for(0, count, kGrain, [&](int64_t b, int64_t e) { add_scaled(sum.data(), grad, alpha, b, e); });
    A* next = k == 0 ? grad_x : buffers[k % 2].get();
    const A* kept = sum.empty() ? grad : sum.data();
    const A share = k > 0 ? A(0) : (sum.empty() ? alpha : A(1));
    const Csr<A>& graph = transposed.at(&input).view;
    for_rows(graph, [&](int64_t b, int64_t e) { spmm_rows(graph, grad, kept, next, b, e, keep, share); });
    grad = next;
  }
}

std::vector<Tensor> backward(const char* op, const Tensor& grad_out_, const Tensor& x_,
                             const std::vector<const Input*>& graphs, const HalfSteps& half_steps, double alpha,
                             bool weight_grad) {
  check_grad_out(op, grad_out_, x_, graphs[0]->sizes.rows);
  const Tensor x = accumulation_copy(x_), grad_out = accumulation_copy(grad_out_);
  std::vector<Tensor> grads{on_huge_pages(new_rows(x, x.size(0), x.scalar_type()))};
  for (const Input* input : graphs)
    grads.push_back(weight_gradient(x, input->sizes, input->graph.weight, weight_grad, x.scalar_type()));
  Interruption interruption;
  if (half_steps.count == 0) {
    grads[0] = torch::stable::clone(grad_out);
  } else if (x.numel() > 0) {
    dispatch_floating(x.scalar_type(), op, [&](auto tag) {
      using A = acc_t<typename decltype(tag)::type>;
      std::map<const Input*, A*> grad_weights;
      for (size_t g = 0; g < graphs.size(); ++g)
        if (grads[g + 1].numel() > 0) grad_weights[graphs[g]] = grads[g + 1].mutable_data_ptr<A>();
      backward(grad_out.const_data_ptr<A>(), graphs, half_steps, x.const_data_ptr<A>(), grads[0].mutable_data_ptr<A>(),
               static_cast<A>(alpha), grad_weights, interruption);
    });
  }
  interruption.check(op);
  for (Tensor& grad : grads) grad = torch::stable::to(grad, x_.scalar_type());
  return grads;
}

using Operators = GraphOperators<Input, forward, backward>;

}  // namespace
}  // namespace msacore::graph_propagation::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def("graph_propagate(Tensor x, Tensor rowptr, Tensor col, Tensor? weight, *, int steps, float alpha) -> Tensor");
  m.def(
      "graph_propagate_backward(Tensor grad_out, Tensor x, Tensor rowptr, Tensor col, Tensor? weight, *, int steps, "
      "float alpha, bool weight_grad) -> (Tensor, Tensor)");
  m.def(
      "alternating_graph_propagate(Tensor x, Tensor intra_rowptr, Tensor intra_col, Tensor? intra_weight, Tensor "
      "inter_rowptr, Tensor inter_col, Tensor? inter_weight, Tensor? first_intra_rowptr, Tensor? first_intra_col, "
      "Tensor? first_intra_weight, *, int steps, float alpha) -> Tensor");
  m.def(
      "alternating_graph_propagate_backward(Tensor grad_out, Tensor x, Tensor intra_rowptr, Tensor intra_col, Tensor? "
      "intra_weight, Tensor inter_rowptr, Tensor inter_col, Tensor? inter_weight, Tensor? first_intra_rowptr, Tensor? "
      "first_intra_col, Tensor? first_intra_weight, *, int steps, float alpha, bool weight_grad) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  using namespace msacore::graph_propagation::cpu;
  m.impl("graph_propagate", TORCH_BOX(&Operators::graph_propagate));
  m.impl("graph_propagate_backward", TORCH_BOX(&Operators::graph_propagate_backward));
  m.impl("alternating_graph_propagate", TORCH_BOX(&Operators::alternating_graph_propagate));
  m.impl("alternating_graph_propagate_backward", TORCH_BOX(&Operators::alternating_graph_propagate_backward));
}
