// Propagation over CSR graphs on the device. A group of lanes owns a row and goes through its edges in their order, so
// that sums need no atomics. Indices are clamped: bad graphs give wrong numbers, never an access out of bounds.
#pragma once
#include "cuda/rows.cuh"

namespace msacore::graph_propagation::cuda {
using namespace msacore::cuda;

constexpr int kGraphThreads = 256;  // 4 blocks per multiprocessor: without that bound ptxas spills to fit 6

// A graph of `rows` targets whose sources are among `nodes`; weight [edges, heads], or null for ones.
template <typename T>
struct Csr {
  const int64_t *rowptr, *col;
  const T* weight;
  int64_t rows, nodes, edges, heads, head_width;

  __device__ int64_t begin(int64_t row) const { return clamped(rowptr[row], edges + 1); }
  __device__ int64_t end(int64_t row) const { return begin(row + 1); }
  __device__ int64_t source(int64_t edge) const { return clamped(col[edge], nodes); }
  __device__ int64_t head_of(int64_t column) const { return heads > 1 ? column / head_width : 0; }
  __device__ acc_t<T> weight_of(int64_t edge, int64_t head) const {
    return weight ? static_cast<acc_t<T>>(weight[edge * heads + head]) : acc_t<T>(1);
  }
};

// Σ_e weight[e] · h[col[e], c … c + V) over the edges of `row`, h [nodes, width]; the columns belong to one head.
template <int V, typename T, typename In>
__device__ __forceinline__ Vector<acc_t<T>, V> gather(const Csr<T>& graph, int64_t row, const In* __restrict__ h,
                                                      int64_t width, int64_t c) {
  Vector<acc_t<T>, V> sum{};
  const int64_t end = graph.end(row), head = graph.head_of(c);
#pragma unroll 4
  for (int64_t e = graph.begin(row); e < end; ++e) {
    const acc_t<T> w = graph.weight_of(e, head);
    const auto value = load<V>(h + graph.source(e) * width + c);
#pragma unroll
    for (int i = 0; i < V; ++i) sum.at[i] += w * static_cast<acc_t<T>>(value.at[i]);
  }
  return sum;
}

// out = keep · A h + alpha · x, all [nodes, width]; α = 0 drops the term instead of multiplying by it: a node that
// sends to nobody is then not read at all.
template <int V, typename T, typename In, typename Out>
__global__ void __launch_bounds__(kGraphThreads, 4)
    step_kernel(Csr<T> graph, const In* __restrict__ h, const T* __restrict__ x, Out* __restrict__ out, int64_t width,
                Lanes lanes, acc_t<T> keep, acc_t<T> alpha) {
  for (int64_t row = lanes.first_row(); row < graph.rows; row += lanes.next_row()) {
    for (int64_t c = lanes.lane() * V; c < width; c += lanes.count() * V) {
      const auto sum = gather<V>(graph, row, h, width, c);
      Vector<T, V> own{};
      if (alpha != 0) own = load<V>(x + row * width + c);
      Vector<Out, V> result;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        result.at[i] = static_cast<Out>(keep * sum.at[i] + alpha * static_cast<acc_t<T>>(own.at[i]));
      }
      store(out + row * width + c, result);
    }
  }
}

// next = keep · Aᵀ grad and sum += share · next, where sum starts as alpha · grad if `sum_before` is null. The last
// step (Out = T, share 1) writes only the sum, which is grad_x. All are [nodes, width]; `graph` is Aᵀ. Terms with
// factor 0 are dropped, not added.
template <int V, typename T, typename In, typename Out>
__global__ void __launch_bounds__(kGraphThreads, 4)
    backward_step_kernel(Csr<T> graph, const In* __restrict__ grad, const acc_t<T>* sum_before, Out* sum,
                         acc_t<T>* __restrict__ next, int64_t width, Lanes lanes, acc_t<T> keep, acc_t<T> alpha,
                         acc_t<T> share) {
  using A = acc_t<T>;
  for (int64_t row = lanes.first_row(); row < graph.rows; row += lanes.next_row()) {
    for (int64_t c = lanes.lane() * V; c < width; c += lanes.count() * V) {
      const int64_t at = row * width + c;
      const auto gathered = gather<V>(graph, row, grad, width, c);
      Vector<A, V> before{}, moved;
      if (sum_before) before = load<V>(sum_before + at);
      Vector<In, V> own{};
      if (!sum_before && alpha != 0) own = load<V>(grad + at);
      Vector<Out, V> total;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        moved.at[i] = keep * gathered.at[i];
        const A start = sum_before ? before.at[i] : alpha * static_cast<A>(own.at[i]);
        total.at[i] = static_cast<Out>(share != 0 ? start + share * moved.at[i] : start);
      }
      store(sum + at, total);
      if (next) store(next + at, moved);
    }
  }
}

// weight_sum[e] += keep · <grad[i], h[col[e]]>, head by head, for the edges e of row i; weight_sum [edges, heads]
template <int V, typename T, typename In, typename State>
__global__ void __launch_bounds__(kGraphThreads, 4)
    edge_dots_kernel(Csr<T> graph, const In* __restrict__ grad, const State* __restrict__ h,
                     acc_t<T>* __restrict__ weight_sum, int64_t width, Lanes lanes, acc_t<T> keep) {
  using A = acc_t<T>;
  for (int64_t row = lanes.first_row(); row < graph.rows; row += lanes.next_row()) {
    const int64_t end = graph.end(row);
    for (int64_t e = graph.begin(row); e < end; ++e) {
      for (int64_t head = 0; head < graph.heads; ++head) {
        const int64_t first = head * graph.head_width, behind = first + graph.head_width;
        A dot = 0;
        for (int64_t c = first + lanes.lane() * V; c < behind; c += lanes.count() * V) {
          const auto g = load<V>(grad + row * width + c);
          const auto value = load<V>(h + graph.source(e) * width + c);
#pragma unroll
          for (int i = 0; i < V; ++i) dot += static_cast<A>(g.at[i]) * static_cast<A>(value.at[i]);
        }
        dot = group_sum(dot, lanes.count());
        if (lanes.lane() == 0) weight_sum[e * graph.heads + head] += keep * dot;
      }
    }
  }
}

template <typename From, typename To>
__global__ void __launch_bounds__(kGraphThreads, 4)
    convert_kernel(const From* __restrict__ from, To* __restrict__ to, int64_t count) {
  for (int64_t i = grid_thread(); i < count; i += grid_threads()) to[i] = static_cast<To>(from[i]);
}

// Computes rowptr_t [nodes + 1], col_t [edges] and weight_t [edges, heads] of Aᵀ from `edge` [edges], the edges ordered
// by their source.
template <typename T>
__global__ void __launch_bounds__(kGraphThreads, 4)
    transpose_kernel(Csr<T> graph, const int64_t* __restrict__ edge, int64_t* __restrict__ rowptr_t,
                     int64_t* __restrict__ col_t, T* __restrict__ weight_t) {
  for (int64_t i = grid_thread(); i <= graph.nodes; i += grid_threads()) {
    rowptr_t[i] = lower_bound(graph.edges, i, [&](int64_t p) { return graph.source(edge[p]); });
  }
  for (int64_t p = grid_thread(); p < graph.edges; p += grid_threads()) {
    const int64_t e = edge[p];
    col_t[p] = clamped(lower_bound(graph.rows, e + 1, [&](int64_t i) { return graph.rowptr[i + 1]; }), graph.rows);
    for (int64_t head = 0; weight_t && head < graph.heads; ++head) {
      weight_t[p * graph.heads + head] = graph.weight[e * graph.heads + head];
    }
  }
}

}  // namespace msacore::graph_propagation::cuda
