// Launches of contrastive losses on CUDA: both passes over a list of terms, in strips of rows that keep memory bounded.
#pragma once
#include <algorithm>
#include <vector>

#include "cuda/scratch.cuh"
#include "contrastive/cuda/gradient_kernels.cuh"

namespace msacore::contrastive::cuda {
using namespace msacore::cuda;

#ifdef __CUDACC__
constexpr int64_t kStatsBytes = int64_t{128} << 20, kGradientStripBytes = int64_t{512} << 20;
#else
constexpr int64_t kStatsBytes = 24 << 10,
                  kGradientStripBytes = 96 << 10;  // little, so that small inputs already take several strips
#endif

inline int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

inline unsigned tiles(int64_t count) { return static_cast<unsigned>((count + kTile - 1) / kTile); }

// Calls body(first, rows) for every strip of the anchors.
template <typename Body>
void for_strips(int64_t rows, int64_t strip, Body&& body) {
  for (int64_t first = 0; first < rows; first += strip) body(first, std::min(strip, rows - first));
}

// Rows of a strip, whole tiles of which each takes `bytes` of the `memory`.
inline int64_t strip_rows(int64_t rows, int64_t bytes, int64_t memory) {
  constexpr int64_t kMostTiles = 65535;  // the limit of gridDim.y
  const int64_t most = std::clamp<int64_t>(memory / std::max<int64_t>(1, bytes), 1, kMostTiles);
  return std::min(rows, most * kTile);
}

// Partial statistics of a row tile of a term, at most.
template <typename T>
int64_t stats_bytes(const Problem<T>& term) {
  return (tiles(term.b.rows) * kTile + term.b.rows) * sizeof(Stats<acc_t<T>>);
}

// Gradients of the similarities of a row tile of a term.
template <typename T, typename K>
int64_t gradient_bytes(const Problem<T>& term) {
  return term.b.rows * kTile * K::kParts * sizeof(typename K::Number);
}

// Fills the results of the first `count` terms, which are of one size and whose sums over classes are there already; of
// `directions` 2 columns are anchors too.
template <typename T, int Most>
void sum_statistics(const Terms<T, Most>& terms, unsigned count, unsigned directions,
                    const AnchorResults<acc_t<T>>& row_results, const AnchorResults<acc_t<T>>& column_results,
                    const Tensor& like, cudaStream_t stream) {
  using A = acc_t<T>;
  const Side<T>&a = terms.at[0].a, &b = terms.at[0].b;
  const int64_t across = tiles(b.rows), columns = directions == 2 ? b.rows : 0;
  const int64_t strip = strip_rows(a.rows, stats_bytes(terms.at[0]) * count, kStatsBytes);
  const bool pairwise = std::any_of(terms.at, terms.at + count, [](const Problem<T>& p) { return p.pairwise; });
  Merge<A> rows{}, others{};
  Parts<double> running;
  const Scratch scratch(like, [&](Scratch& memory) {
    const auto take = [&](auto& parts, int64_t size) {
      memory.take(parts.softmax, size);
      memory.take(parts.positives, pairwise ? size : 0);
    };
    take(rows.partial, count * across * strip);
    take(others.partial, count * tiles(strip) * columns);
    take(running, count * columns);
  });
  rows.count = across;
  rows.begin = rows.end = true;
  rows.results = row_results;
  others.stride = b.rows;
  others.n = columns ? b.n : 0;
  others.begin = true;
  others.running = running;
  others.results = column_results;
  const auto merge = [&] {
    launch(merge_kernel<T, Most>, dim3(grid_for(std::max(rows.n, others.n), kRowThreads).x, directions, count),
           dim3(kRowThreads), 0, stream, terms, rows, others);
  };
  for_strips(a.rows, strip, [&](int64_t first, int64_t size) {
    launch(statistics_kernel<T, Most>, dim3(static_cast<unsigned>(across), tiles(size), count), dim3(kTileThreads),
           kSimilarityBytes<T>, stream, terms, first, rows.partial, others.partial, row_results, column_results);
    rows.stride = size;
    rows.first = first;
    rows.n = std::min(size, a.n - first);
    others.count = tiles(size);
    others.begin = first == 0;
    others.end = first + size == a.rows;
    merge();
  });
  if (a.rows == 0) {  // the columns are anchors without candidates
    others.end = true;
    merge();
  }
}

// Adds what the first `count` terms, which are of one size, give to the outputs, or begins these. Gradients of
// similarities are kept as K; `grad_weights` and `slopes` as for gradient_kernel.
template <int MostOutputs, typename K, typename T, int MostTerms>
void sum_gradients(const Terms<T, MostTerms>& terms, unsigned count, const std::vector<Output<acc_t<T>>>& outputs,
                   bool add, T* grad_weights, double* slopes, const Tensor& like, cudaStream_t stream) {
  using A = acc_t<T>;
  const Side<T>&a = terms.at[0].a, &b = terms.at[0].b;
  const int64_t strip = strip_rows(a.rows, gradient_bytes<T, K>(terms.at[0]) * count, kGradientStripBytes);
  typename K::Number* strips;
  const Scratch scratch(like, [&](Scratch& memory) { memory.take(strips, count * K::kParts * strip * b.rows); });
  const auto products = [&](unsigned contributing, int64_t first, int64_t size) {
    for (size_t begin = 0; begin < outputs.size(); begin += MostOutputs) {
      Outputs<A, MostOutputs> group{};
      int64_t rows = 0, width = 0;
      unsigned members = 0;
      for (size_t k = begin; k < std::min(outputs.size(), begin + MostOutputs); ++k) {
        group.at[members++] = outputs[k];
        rows = std::max(rows, outputs[k].rows);
        width = std::max(width, outputs[k].width);
      }
      launch(product_kernel<T, K, MostTerms, MostOutputs>, dim3(tiles(width), tiles(rows), members), dim3(kTileThreads),
             kProductBytes<T, K>, stream, terms, static_cast<int>(contributing), group, strips, first, size,
             add || first > 0);
    }
  };
  if (a.rows == 0) products(0, 0, 0);  // nothing but zeros
  for_strips(a.rows, strip, [&](int64_t first, int64_t size) {
    launch(gradient_kernel<T, K, MostTerms>, dim3(tiles(b.rows), tiles(size), count), dim3(kTileThreads),
           kSimilarityBytes<T>, stream, terms, first, strips, grad_weights, slopes);
    products(count, first, size);
  });
}

}  // namespace msacore::contrastive::cuda
