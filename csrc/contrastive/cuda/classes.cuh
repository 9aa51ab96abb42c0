// Launches for positives that are sums over classes on CUDA.
#pragma once
#include <algorithm>

#include "core/round.h"
#include "cuda/launch.cuh"
#include "cuda/scratch.cuh"
#include "cuda/sort.cuh"
#include "contrastive/cuda/classes_kernels.cuh"

namespace msacore::contrastive::cuda {
using namespace msacore::cuda;

// With at most this many rows, labels are compared pair by pair in the tiles, which is estimated to cost less than
// these launches.
#ifndef MSACORE_SMALL_SIZES
constexpr int64_t kPairwiseRows = 4096;
constexpr int kChunk = kMostChunk;
#else
constexpr int64_t kPairwiseRows = 8;  // small, so that even small inputs have sums over classes
constexpr int kChunk = 8;             // and classes of several pieces
#endif
static_assert(kChunk % kAhead == 0 && kChunk <= kMostChunk);

// The classes of the labels of a loss: ordered once, for all terms that have these labels.
class Classes {
 public:
  // `b` equal to `a`: one set of labels for both sides.
  Classes(const int64_t* a, int64_t n, const int64_t* b, int64_t m, const Tensor& like, cudaStream_t stream)
      : same_(a == b && n == m), like_(like), stream_(stream) {
    const Labels labels{{a, b}, {n, same_ ? 0 : m}};
    const int64_t rows = labels.rows();
    int64_t size = 2;
    while (size < 2 * rows) size *= 2;
    ClassTable table{};
    table.mask = size - 1;
    int64_t *slot, *begins;
    const Scratch scratch(like, [&](Scratch& memory) {
      memory.take(table.key, size);
      memory.take(table.left, size);
      memory.take(slot, rows);
    });
    begins_ = new_int64(2 * rows);
    begins = begins_.mutable_data_ptr<int64_t>();
    clear_memory(table.key, size * sizeof(*table.key), stream);
    clear_memory(table.left, size * sizeof(*table.left), stream);
    clear_memory(begins, 2 * rows * sizeof(*begins), stream);
    for (int s = 0; s < 2; ++s) numbers_[s] = new_int64(labels.n[s]);
    launch(find_labels_kernel, grid_for(rows, kRowThreads), dim3(kRowThreads), 0, stream, labels, table, slot);
    launch(number_classes_kernel, grid_for(rows, kRowThreads), dim3(kRowThreads), 0, stream, labels, table, slot,
           numbers_[0].mutable_data_ptr<int64_t>(), numbers_[1].mutable_data_ptr<int64_t>());
    for (int s = 0; s < 2; ++s) {
      if (s == 1 && same_) {
        order_[1] = order_[0];
        break;
      }
      rows_[s] = sorted_positions(numbers_[s], rows + 1, stream);
      order_[s] = {numbers_[s].const_data_ptr<int64_t>(), rows_[s].const_data_ptr<int64_t>(), begins + s * rows,
                   labels.n[s], rows};
    }
  }

  // The positives of those of the first `count` terms that have them by class; called before the statistics of their
  // tiles.
  template <typename T, int Most>
  void sum_positives(const Terms<T, Most>& terms, unsigned count, unsigned directions,
                     const AnchorResults<acc_t<T>>& rows, const AnchorResults<acc_t<T>>& columns) const {
    for (unsigned t = 0; t < count; ++t)
      with_sums(terms.at[t], false, [&](const ClassProblem<T>& p, unsigned blocks) {
        launch(class_positives_kernel<T>, dim3(blocks, directions), dim3(kRowThreads), 0, stream_, p,
               rows.of_term(t, p.problem.a.n), columns.of_term(t, p.problem.b.n));
      });
  }

  // The gradients of those positives; called after the gradients of the tiles.
  template <typename T, int Most>
  void add_gradients(const Terms<T, Most>& terms, unsigned count) const {
    for (unsigned t = 0; t < count; ++t)
      with_sums(terms.at[t], true, [&](const ClassProblem<T>& p, unsigned blocks) {
        const bool one = p.problem.a.gradient == p.problem.b.gradient;
        launch(attract_kernel<T>, dim3(blocks, one ? 1 : 2), dim3(kRowThreads), 0, stream_, p);
      });
  }

 private:
  Tensor new_int64(int64_t count) const { return empty_tensor(like_, {count}, ScalarType::Long); }

  template <typename T, typename Body>
  void with_sums(const Problem<T>& problem, bool weighted, Body&& body) const {
    if (!problem.by_classes()) return;
    const int64_t most = std::max(problem.a.n, problem.b.n), width = problem.a.width;
    ClassProblem<T> p{};
    p.problem = problem;
    p.chunk = kChunk;
    const Scratch scratch(like_, [&](Scratch& memory) {
      for (int s = 0; s < 2; ++s) {
        const int64_t n = s == 0 ? problem.a.n : problem.b.n;
        memory.take(p.sums[s].plain, n * width);
        if (weighted) memory.take(p.sums[s].weighted, n * width);
        memory.take(p.sums[s].members, n);
      }
    });
    for (int s = 0; s < 2; ++s) p.order[s] = order_[s];
    const unsigned chunks = static_cast<unsigned>(ceil_div(most, kChunk)),
                   parts = static_cast<unsigned>(ceil_div(width, kRowThreads));
    launch(sum_pieces_kernel<T>, dim3(chunks, std::max(1u, parts), 2), dim3(kRowThreads), 0, stream_, p);
    if (chunks > 1)
      launch(merge_pieces_kernel<T>, dim3(chunks - 1, std::max(1u, parts), 2), dim3(kRowThreads), 0, stream_, p);
    body(p, grid_for(most, kRowThreads / kWarp).x);
  }

  bool same_;
  const Tensor& like_;
  cudaStream_t stream_;
  Tensor begins_, numbers_[2], rows_[2];
  ClassOrder order_[2];
};

// Whether positives are sums over classes: there are labels, and too many rows to compare them pair by pair.
inline bool by_classes(const int64_t* labels, int64_t n, int64_t m) {
  return labels && std::max(n, m) > limit_from("MSACORE_CUDA_PAIRWISE_ROWS", kPairwiseRows);
}

}  // namespace msacore::contrastive::cuda
