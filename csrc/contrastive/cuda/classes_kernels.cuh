// Positives of equal label on CUDA as sums over classes, as on the CPU (contrastive/cpu/classes.h): O(n d) besides the
// tiles. Labels become class numbers in a hash table, each side is sorted by them, and the rows of a class are summed
// in their order: large classes in pieces first, whose sums are then added up.
#pragma once
#include "cuda/rows.cuh"
#include "contrastive/cuda/gradient_kernels.cuh"

namespace msacore::contrastive::cuda {
using namespace msacore::cuda;

constexpr int kMostChunk = 256;
constexpr int kAhead = 8;  // loads in flight

// The labels of one or two sides; rows of the second are counted from n[0] on.
struct Labels {
  const int64_t* label[2];
  int64_t n[2];

  __host__ __device__ int64_t rows() const { return n[0] + n[1]; }
  __device__ int64_t at(int64_t i) const { return i < n[0] ? label[0][i] : label[1][i - n[0]]; }
};

// A hash table with open addressing, initially zeros.
struct ClassTable {
  unsigned long long* key;   // label + 1
  unsigned long long* left;  // rows from the first of the label to the end
  int64_t mask;              // size - 1, a power of two less 1

  __device__ int64_t start(unsigned long long label) const {
    label = (label ^ label >> 33) * 0xff51afd7ed558ccdull;
    label = (label ^ label >> 33) * 0xc4ceb9fe1a85ec53ull;
    return static_cast<int64_t>((label ^ label >> 33) & static_cast<unsigned long long>(mask));
  }
};

namespace {  // several families include this file

// Reads what other threads may be writing; an old value costs one atomic operation, no more.
__device__ __forceinline__ unsigned long long peek(const unsigned long long* at) {
  return *static_cast<const volatile unsigned long long*>(at);
}

// slot[i] ← the slot of the label of row i. Slots depend on the order of threads, ClassTable::left does not.
__global__ void __launch_bounds__(kRowThreads)
    find_labels_kernel(Labels labels, ClassTable table, int64_t* __restrict__ slot) {
  for (int64_t i = grid_thread(); i < labels.rows(); i += grid_threads()) {
    if (labels.at(i) < 0) continue;
    const unsigned long long key = static_cast<unsigned long long>(labels.at(i)) + 1,
                             left = static_cast<unsigned long long>(labels.rows() - i);
    int64_t s = table.start(key);
    for (;; s = (s + 1) & table.mask) {
      unsigned long long found = peek(table.key + s);
      if (found == 0) found = atomicCAS(table.key + s, 0ull, key);
      if (found == 0 || found == key) break;
    }
    if (peek(table.left + s) < left) atomicMax(table.left + s, left);
    slot[i] = s;
  }
}

// first, second ← the class number of each row of either side: the first row of the same label; `rows` where a row has
// no label.
__global__ void __launch_bounds__(kRowThreads)
    number_classes_kernel(Labels labels, ClassTable table, const int64_t* __restrict__ slot,
                          int64_t* __restrict__ first, int64_t* __restrict__ second) {
  for (int64_t i = grid_thread(); i < labels.rows(); i += grid_threads()) {
    const int64_t left = labels.at(i) < 0 ? 0 : static_cast<int64_t>(table.left[slot[i]]);
    *(i < labels.n[0] ? first + i : second + i - labels.n[0]) = labels.rows() - left;
  }
}

}  // namespace

// The rows of a side by class.
struct ClassOrder {
  const int64_t* number;  // [n] a row's class number; `classes` where it has none
  const int64_t* row;     // [n] sorted by `number`, then by index
  int64_t* begin;         // [classes] where a class begins in `row`, plus 1; 0 where it is not on this side
  int64_t n, classes;

  __device__ int64_t class_at(int64_t position) const { return number[row[position]]; }
  // -1: the class of that number has no rows here.
  __device__ int64_t begin_of(int64_t c) const { return c < classes ? begin[c] - 1 : -1; }
};

// Sums over the rows of a side that take part in a term. The sum of a class is stored where the class begins in
// ClassOrder::row, the sum of a later piece where that piece begins.
template <typename A>
struct ClassSums {
  A* plain;      // [n, width] Σ unit row
  A* weighted;   // [n, width] backward: Σ attract · unit row; else null
  int* members;  // [n]
};

// A term with labels; index 0 stands for the anchors, 1 for the candidates.
template <typename T>
struct ClassProblem {
  Problem<T> problem;
  int chunk;  // rows of a piece: a multiple of kAhead, at most kMostChunk
  ClassOrder order[2];
  ClassSums<acc_t<T>> sums[2];

  __device__ const Side<T>& side(int s) const { return s == 0 ? problem.a : problem.b; }
  __device__ AnchorGradient<acc_t<T>> gradient(int s, int64_t i) const {
    return anchor_gradient(problem, side(s), side(1 - s), i);
  }
  // Whether the row of the same index, which is left out, would be a positive of row i of side s.
  __device__ bool without_self(int s, int64_t i) const {
    const Side<T>& other = side(1 - s);
    return problem.exclude_self && i < other.n && used(other.factor_of(i)) &&
           order[1 - s].number[i] == order[s].number[i];
  }
};

// Grid [chunks of ClassOrder::row, parts of the width, sides]: sums over the pieces into which the borders of chunks
// cut classes; also writes where classes begin.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) sum_pieces_kernel(const __grid_constant__ ClassProblem<T> p) {
  using A = acc_t<T>;
  const int s = static_cast<int>(blockIdx.z);
  const Side<T>& side = p.side(s);
  const ClassOrder& order = p.order[s];
  const ClassSums<A>& sums = p.sums[s];
  MSACORE_SHARED(row, int64_t[kMostChunk]);
  MSACORE_SHARED(factor, A[kMostChunk]);
  MSACORE_SHARED(attract, A[kMostChunk]);
  MSACORE_SHARED(ends, bool[kMostChunk]);
  const int64_t begin = int64_t{blockIdx.x} * p.chunk;
  for (int r = thread_in_block(); r < p.chunk; r += kRowThreads) {
    const int64_t position = begin + r;
    const bool inside = position < order.n;
    row[r] = inside ? order.row[position] : 0;
    factor[r] = inside ? side.factor_of(row[r]) : A(-1);
    attract[r] = inside && sums.weighted ? p.gradient(s, row[r]).attract : A(0);
    ends[r] = inside &&
              (r + 1 == p.chunk || position + 1 == order.n || order.class_at(position + 1) != order.class_at(position));
    if (inside && blockIdx.y == 0) {
      const int64_t c = order.class_at(position);
      if (c < order.classes && (position == 0 || order.class_at(position - 1) != c)) order.begin[c] = position + 1;
    }
  }
  __syncthreads();
  const int64_t k = int64_t{blockIdx.y} * kRowThreads + thread_in_block();
  double plain = 0, weighted = 0;
  int members = 0;
  int64_t piece = begin;
  for (int from = 0; from < p.chunk; from += kAhead) {
    T unit[kAhead];
#pragma unroll
    for (int r = 0; r < kAhead; ++r)
      unit[r] = k < side.width && used(factor[from + r]) ? side.unit[row[from + r] * side.width + k] : T(0.0f);
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      const bool part = used(factor[from + r]);
      const double value = part ? static_cast<double>(static_cast<A>(unit[r])) * factor[from + r] : 0;
      plain += value;
      weighted += value * attract[from + r];
      members += part;
      if (!ends[from + r]) continue;
      if (k < side.width) {
        sums.plain[piece * side.width + k] = static_cast<A>(plain);
        if (sums.weighted) sums.weighted[piece * side.width + k] = static_cast<A>(weighted);
      }
      if (k == 0) sums.members[piece] = members;
      plain = weighted = 0;
      members = 0;
      piece = begin + from + r + 1;
    }
  }
}

// Grid [borders between chunks, parts of the width, sides]: the first border within a class adds up its pieces, in
// order.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) merge_pieces_kernel(const __grid_constant__ ClassProblem<T> p) {
  using A = acc_t<T>;
  const int s = static_cast<int>(blockIdx.z);
  const ClassOrder& order = p.order[s];
  const ClassSums<A>& sums = p.sums[s];
  const int64_t border = (int64_t{blockIdx.x} + 1) * p.chunk, width = p.side(s).width;
  if (border >= order.n) return;
  const int64_t c = order.class_at(border), begin = order.begin_of(c);
  if (begin < 0 || begin >= border || begin < border - p.chunk) return;
  const int64_t end = lower_bound(order.n, c + 1, [&](int64_t position) { return order.class_at(position); });
  const int64_t k = int64_t{blockIdx.y} * kRowThreads + thread_in_block();
  const auto add_up = [&](A* sum) {
    double all = sum[begin * width + k];
#pragma unroll 8
    for (int64_t piece = border; piece < end; piece += p.chunk) all += sum[piece * width + k];
    sum[begin * width + k] = static_cast<A>(all);
  };
  if (k < width) {
    add_up(sums.plain);
    if (sums.weighted) add_up(sums.weighted);
  }
  if (k == 0)
    for (int64_t piece = border; piece < end; piece += p.chunk) sums.members[begin] += sums.members[piece];
}

// Grid [blocks, directions]: number and mean similarity of the positives of each row, a warp each. Where columns are
// not anchors, their direction repeats that of the rows.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4)
    class_positives_kernel(const __grid_constant__ ClassProblem<T> p,
                           const __grid_constant__ AnchorResults<acc_t<T>> rows,
                           const __grid_constant__ AnchorResults<acc_t<T>> columns) {
  using A = acc_t<T>;
  const int s = blockIdx.y == 1 && p.problem.two_sided;
  const Side<T>&own = p.side(s), &other = p.side(1 - s);
  const ClassSums<A>& sums = p.sums[1 - s];
  const AnchorResults<A>& results = blockIdx.y == 1 ? columns : rows;
  const int64_t warps = int64_t{gridDim.x} * (kRowThreads / kWarp);
  for (int64_t i = int64_t{blockIdx.x} * (kRowThreads / kWarp) + warp_id(); i < own.n; i += warps) {
    const A factor = own.factor_of(i);
    const int64_t begin = used(factor) ? p.order[1 - s].begin_of(p.order[s].number[i]) : -1;
    const bool without_self = begin >= 0 && p.without_self(s, i);
    const int total = begin >= 0 ? sums.members[begin] - without_self : 0;
    double similarity = 0;
    if (total > 0) {
      const A* sum = sums.plain + begin * own.width;
      for (int64_t k = lane_id(); k < own.d; k += kWarp) {
        double positives = sum[k];
        if (without_self)
          positives -= static_cast<double>(static_cast<A>(other.unit[i * own.width + k])) * other.factor[i];
        similarity += positives * static_cast<double>(static_cast<A>(own.unit[i * own.width + k])) * factor;
      }
      similarity = warp_sum(similarity) / total;
    }
    if (lane_id() == 0) results.set_positives(own.n, i, total, similarity);
  }
}

// Row i of side s, called by a warp: its gradient -= factor · Σ (attract of both rows) · unit row, over the rows of its
// class on the other side.
template <typename T>
__device__ __forceinline__ void attract_row(const ClassProblem<T>& p, int s, int64_t i) {
  using A = acc_t<T>;
  const Side<T>&own = p.side(s), &other = p.side(1 - s);
  const ClassSums<A>& sums = p.sums[1 - s];
  const A factor = own.factor_of(i);
  const int64_t begin = used(factor) ? p.order[1 - s].begin_of(p.order[s].number[i]) : -1;
  if (begin < 0) return;
  const double attract = p.gradient(s, i).attract;
  const bool without_self = p.without_self(s, i);
  const double self = without_self ? (attract + p.gradient(1 - s, i).attract) * other.factor[i] : 0;
  for (int64_t k = lane_id(); k < own.width; k += kWarp) {
    double pull = attract * sums.plain[begin * own.width + k] + sums.weighted[begin * own.width + k];
    if (without_self) pull -= self * static_cast<A>(other.unit[i * own.width + k]);
    own.gradient[i * own.width + k] -= static_cast<A>(factor * pull);
  }
}

// Grid [blocks, gradients]: adds what the positives give to the gradient of each side; where both sides share one
// gradient, it gets the parts of both.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4) attract_kernel(const __grid_constant__ ClassProblem<T> p) {
  const int64_t warps = int64_t{gridDim.x} * (kRowThreads / kWarp);
  for (int s = static_cast<int>(blockIdx.y); s < 2; s += static_cast<int>(gridDim.y))
    for (int64_t i = int64_t{blockIdx.x} * (kRowThreads / kWarp) + warp_id(); i < p.side(s).n; i += warps)
      attract_row(p, s, i);
}

}  // namespace msacore::contrastive::cuda
