// Launches of contrastive losses on CUDA: both passes over a list of terms, in strips of rows that keep memory bounded.
#pragma once
#include <algorithm>
#include <vector>

#include "core/optional.h"
#include "core/round.h"
#include "cuda/scratch.cuh"
#include "contrastive/cuda/gradient_kernels.cuh"
#include "contrastive/cuda/negatives_kernels.cuh"

namespace msacore::contrastive::cuda {
using namespace msacore::cuda;

#ifndef MSACORE_SMALL_SIZES
constexpr int64_t kStatsBytes = int64_t{128} << 20, kGradientStripBytes = int64_t{512} << 20;
#else
constexpr int64_t kStatsBytes = 24 << 10,
                  kGradientStripBytes = 96 << 10;  // small, so that even small inputs take several strips
#endif

// How many members a launch takes, of the `most` that its parameters can hold.
constexpr int group_size(int most) {
#ifndef MSACORE_SMALL_SIZES
  return most;
#else
  return std::min(most, 4);  // few, so that even the terms of three modalities are several groups
#endif
}

inline int64_t padded(int64_t count, int64_t to) { return round_up(count, to); }

inline unsigned tiles(int64_t count) { return static_cast<unsigned>(ceil_div(count, kTile)); }

// Calls body(first, rows) for every strip of the anchors.
template <typename Body>
void for_strips(int64_t rows, int64_t strip, Body&& body) {
  for (int64_t first = 0; first < rows; first += strip) body(first, std::min(strip, rows - first));
}

// Rows of a strip that fits into `memory`, in whole tiles; each tile of rows takes `bytes`.
inline int64_t strip_rows(int64_t rows, int64_t bytes, int64_t memory) {
  constexpr int64_t kMostTiles = 65535;  // the limit of gridDim.y
  const int64_t most = std::clamp<int64_t>(memory / std::max<int64_t>(1, bytes), 1, kMostTiles);
  return std::min(rows, most * kTile);
}

// Bytes of the partial statistics of a row tile of a term, at most.
template <typename T>
int64_t stats_bytes(const Problem<T>& term) {
  return (tiles(term.b.rows) * kTile + term.b.rows) * sizeof(Stats<acc_t<T>>);
}

// Bytes of the gradients of the similarities of a row tile of a term.
template <typename T, typename K>
int64_t gradient_bytes(const Problem<T>& term) {
  return term.b.rows * kTile * K::kParts * sizeof(typename K::Number);
}

// Sums over the similarities of the first `count` terms, which are of one size, strip after strip. `softmax` and
// `positives`: which statistics of an anchor a sweep finds. sweep(first, grid, row parts, column parts) launches one
// sweep over a strip, merge(rows, columns, grid) adds its parts up.
template <typename T, int Most, typename Sweep, typename Add>
void sum_strips(const Terms<T, Most>& terms, unsigned count, unsigned directions, bool softmax, bool positives,
                const AnchorResults<acc_t<T>>& row_results, const AnchorResults<acc_t<T>>& column_results,
                const Tensor& like, Sweep&& sweep, Add&& merge) {
  using A = acc_t<T>;
  const Side<T>&a = terms.at[0].a, &b = terms.at[0].b;
  const int64_t across = tiles(b.rows), columns = directions == 2 ? b.rows : 0;
  const int64_t strip = strip_rows(a.rows, stats_bytes(terms.at[0]) * count, kStatsBytes);
  Merge<A> rows{}, others{};
  Parts<double> running;
  const Scratch scratch(like, [&](Scratch& memory) {
    const auto take = [&](auto& parts, int64_t size) {
      memory.take(parts.softmax, softmax ? size : 0);
      memory.take(parts.positives, positives ? size : 0);
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
  const auto add = [&] {
    merge(rows, others, dim3(grid_for(std::max(rows.n, others.n), kRowThreads).x, directions, count));
  };
  for_strips(a.rows, strip, [&](int64_t first, int64_t size) {
    sweep(first, dim3(static_cast<unsigned>(across), tiles(size), count), rows.partial, others.partial);
    rows.stride = size;
    rows.first = first;
    rows.n = std::min(size, a.n - first);
    others.count = tiles(size);
    others.begin = first == 0;
    others.end = first + size == a.rows;
    add();
  });
  if (a.rows == 0) {  // the columns are anchors without candidates
    others.end = true;
    add();
  }
}

// Fills the results of the first `count` terms, which are of one size and whose sums over classes have been taken
// already; with 2 `directions`, columns are anchors too. `Apart`: denominators without positives.
template <bool Apart, typename T, int Most>
void sum_statistics(const Terms<T, Most>& terms, unsigned count, unsigned directions,
                    const AnchorResults<acc_t<T>>& row_results, const AnchorResults<acc_t<T>>& column_results,
                    const Tensor& like, cudaStream_t stream) {
  using A = acc_t<T>;
  const bool pairwise = std::any_of(terms.at, terms.at + count, [](const Problem<T>& p) { return p.pairwise; });
  sum_strips(
      terms, count, directions, true, pairwise, row_results, column_results, like,
      [&](int64_t first, dim3 grid, const Parts<A>& rows, const Parts<A>& columns) {
        launch(statistics_kernel<T, Most, Apart>, grid, dim3(kTileThreads), kSimilarityBytes<T>, stream, terms, first,
               rows, columns, row_results, column_results);
      },
      [&](const Merge<A>& rows, const Merge<A>& columns, dim3 grid) {
        launch(merge_kernel<T, Most>, grid, dim3(kRowThreads), 0, stream, terms, rows, columns);
      });
}

// The second sweep, where each positive is set against the negatives alone.
template <typename T, int Most>
void sum_against_negatives(const Terms<T, Most>& terms, unsigned count, unsigned directions,
                           const AnchorResults<acc_t<T>>& row_results, const AnchorResults<acc_t<T>>& column_results,
                           const Tensor& like, cudaStream_t stream) {
  using A = acc_t<T>;
  sum_strips(
      terms, count, directions, false, true, row_results, column_results, like,
      [&](int64_t first, dim3 grid, const Parts<A>& rows, const Parts<A>& columns) {
        launch(against_negatives_kernel<T, Most>, grid, dim3(kTileThreads), kSimilarityBytes<T>, stream, terms, first,
               rows, columns, row_results, column_results);
      },
      [&](const Merge<A>& rows, const Merge<A>& columns, dim3 grid) {
        launch(merge_against_kernel<T, Most>, grid, dim3(kRowThreads), 0, stream, terms, rows, columns);
      });
}

// Adds what the first `count` terms, which are of one size, give to the outputs or, without `add`, overwrites them with
// it. Gradients of similarities are kept as K; `grad_weights` and `slopes` as for gradient_kernel.
template <int MostOutputs, typename K, bool Apart, typename T, int MostTerms>
void sum_gradients(const Terms<T, MostTerms>& terms, unsigned count, const std::vector<Output<acc_t<T>>>& outputs,
                   bool add, T* grad_weights, double* slopes, const Tensor& like, cudaStream_t stream) {
  using A = acc_t<T>;
  const Side<T>&a = terms.at[0].a, &b = terms.at[0].b;
  const int64_t strip = strip_rows(a.rows, gradient_bytes<T, K>(terms.at[0]) * count, kGradientStripBytes);
  typename K::Number* strips;
  const Scratch scratch(like, [&](Scratch& memory) { memory.take(strips, count * K::kParts * strip * b.rows); });
  const auto products = [&](unsigned contributing, int64_t first, int64_t size) {
    for (size_t begin = 0; begin < outputs.size(); begin += group_size(MostOutputs)) {
      Outputs<A, MostOutputs> group{};
      int64_t rows = 0, width = 0;
      unsigned members = 0;
      for (size_t k = begin; k < std::min(outputs.size(), begin + group_size(MostOutputs)); ++k) {
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
    launch(gradient_kernel<T, K, MostTerms, Apart>, dim3(tiles(b.rows), tiles(size), count), dim3(kTileThreads),
           kSimilarityBytes<T>, stream, terms, first, strips, grad_weights, slopes);
    products(count, first, size);
  });
}

// A learned temperature, or a number.
inline Temperature temperature_of(const char* op, const OptionalTensor& learned, double number) {
  if (!learned) return {nullptr, Temperature::kNumber, number};
  return dispatch_floating(learned->scalar_type(), op, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr Temperature::Kind kind = std::is_same_v<S, float>    ? Temperature::kFloat
                                       : std::is_same_v<S, double> ? Temperature::kDouble
                                       : std::is_same_v<S, Half>   ? Temperature::kHalf
                                                                   : Temperature::kBFloat16;
    return Temperature{learned->const_data_ptr<S>(), kind, 0};
  });
}

// The gradient of a temperature, of the same dtype.
inline TemperatureGradient gradient_of(const Temperature& temperature, Tensor& gradient) {
  return {temperature.kind == Temperature::kNumber ? nullptr : gradient.mutable_data_ptr(), temperature.kind};
}

}  // namespace msacore::contrastive::cuda
