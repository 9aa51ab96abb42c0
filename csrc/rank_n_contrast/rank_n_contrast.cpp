// Rank-N-Contrast on the CPU: tiles of anchors against all samples, so that no N × N matrix exists.
#include "rank_n_contrast/rank_n_contrast.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "core/dtype.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "rank_n_contrast/rank_n_contrast_centre.h"
#include "rank_n_contrast/rank_n_contrast_labels.h"
#include "rank_n_contrast/rank_n_contrast_rows.h"

namespace msacore::rank_n_contrast::cpu {
namespace {

constexpr int64_t kTileElements = 1 << 21, kLeastTileRows = 64;
constexpr int64_t kRowsPerTask = 16, kSamplesPerTask = 64;

// The embeddings less their mean, which changes no distance and keeps the expanded squares accurate, in units of their
// spread. Their last column is all ones, so that a product with them gives row sums too.
template <typename T, typename A>
struct Centred {
  const T* embeddings;
  const std::vector<int64_t>& sample;
  const Spread& spread;
  int64_t n, width, padded;
  double to_units;
  Scratch memory;
  A *rows, *square;  // [n, padded], [n]: far rows are zeros, their squares infinite

  Centred(const T* embeddings, const std::vector<int64_t>& sample, const Spread& spread, int64_t width)
      : embeddings(embeddings),
        sample(sample),
        spread(spread),
        n(static_cast<int64_t>(sample.size())),
        width(width),
        padded(width + 1),
        to_units(spread.to_units()),
        rows(memory.take<A>(n * padded)),
        square(memory.take<A>(n)) {
    const std::vector<double> mean = mean_of_near();
    for (int64_t p = 0; p < n; ++p) {
      A* out = rows + p * padded;
      square[p] = 0;
      for (int64_t c = 0; c < width; ++c) {
        out[c] = static_cast<A>(value(p, c) - mean[c]);
        square[p] += out[c] * out[c];
      }
      out[width] = 1;
      if (!std::is_same_v<A, double> || !spread.is_far(p)) continue;
      std::fill_n(out, width, A(0));
      square[p] = std::numeric_limits<A>::infinity();
    }
  }
  const T* original(int64_t p) const { return embeddings + sample[p] * width; }
  double value(int64_t p, int64_t c) const { return static_cast<acc_t<T>>(original(p)[c]) * to_units; }
  Block<A> block() const { return {rows, n, padded, padded}; }

 private:
  std::vector<double> mean_of_near() const {
    std::vector<double> mean(width, 0);
    double count = 0;
    for (int64_t p = 0; p < n; ++p) {
      if (!(spread.norm[p] <= kMeanReach * spread.median)) continue;
      for (int64_t c = 0; c < width; ++c) mean[c] += value(p, c);
      ++count;
    }
    for (double& m : mean) m /= std::max(count, 1.0);
    return mean;
  }
};

// Two samples whose term of the gradient is added as a difference, not through the products: they are so close that
// products cancel, or one is far.
template <typename A>
struct NearPair {
  int64_t other;
  A factor;
};

// Walks over tiles of anchors. A tile holds a row per anchor: products, then distances, then factors of the gradient.
template <typename T, typename A>
class Sweep {
 public:
  Sweep(const Problem& problem, const Labels& labels, const Spread& spread, double temperature)
      : pool_(problem.embeddings.const_data_ptr<T>(), labels.sample(), spread, problem.width),
        labels_(labels),
        begin_(std::min(problem.anchor_begin, pool_.n)),
        end_(std::min(problem.anchor_end, pool_.n)),
        temperature_(temperature),
        // Slopes beyond 1e300, which have no finite result, are cut to it.
        slope_(static_cast<A>(std::min(std::ldexp(1 / temperature, spread.exponent), 1e300))),
        tile_rows_(std::min(pool_.n, std::max(kLeastTileRows, kTileElements / pool_.n))),
        tile_(memory_.take<A>(tile_rows_ * pool_.n)) {}

  // Σ of the anchors' losses.
  double loss() {
    std::vector<double> losses(pool_.n, 0);
    for_anchors(
        [&](int64_t self, int64_t, A* distance, Row<A>& row) {
          const std::optional<Similarities> below = prepare(self, distance, row);
          losses[self] = below ? below->fall + sums(row, *below) : std::numeric_limits<double>::quiet_NaN();
        },
        [](int64_t, int64_t, const Block<A>&) {}, [](int64_t, int64_t) {});
    return std::accumulate(losses.begin(), losses.end(), 0.0);
  }

  // `scale` times the gradient of loss(), into the rows of the samples; returns that of the temperature.
  double gradient(double scale, T* out) {
    const int64_t n = pool_.n, padded = pool_.padded;
    // Per sample Σ a (e_other - mean) and, in the last column, Σ a, where each pair's factor a counts for both of its
    // samples.
    A* sums = memory_.take<A>(n * padded);
    std::fill_n(sums, n * padded, A(0));
    std::vector<std::vector<NearPair<A>>> near(tile_rows_);
    std::vector<double> of_temperature(n, 0);
    for_anchors(
        [&](int64_t self, int64_t i, A* distance, Row<A>& row) {
          of_temperature[self] = factors(self, distance, row, static_cast<A>(-scale / temperature_), near[i]);
        },
        [&](int64_t first, int64_t count, const Block<A>& rows) {
          multiply(Block<A>{sums, n, padded, padded}.rows_from(first, count), constant(rows), constant(pool_.block()),
                   true);
        },
        [&](int64_t first, int64_t count) {
          const Block<const A> from = constant(pool_.block().rows_from(first, count));
          parallel_for(0, n, kSamplesPerTask, [&](int64_t begin, int64_t end) {
            const Block<A> columns = Block<A>{tile_, count, n, n}.columns(begin, end - begin);
            multiply(Block<A>{sums, n, padded, padded}.rows_from(begin, end - begin), constant(columns.transposed()),
                     from, true);
          });
          add_near(first, count, near, sums);
        });
    for (int64_t p = 0; p < n; ++p) {
      const A *row = pool_.rows + p * padded, *sum = sums + p * padded;
      for (int64_t c = 0; c < pool_.width; ++c)
        out[pool_.sample[p] * pool_.width + c] = static_cast<T>(sum[pool_.width] * row[c] - sum[c]);
    }
    const double sum = std::accumulate(of_temperature.begin(), of_temperature.end(), 0.0);
    return scale * sum * slope_ / temperature_;
  }

 private:
  // Calls on_anchor(self, its place in the tile, its row of the tile, scratch memory) for every anchor and
  // on_part(first, count, rows of the tile) after some of them, both in parallel; on_tile(first, count) after each
  // tile.
  template <typename OnAnchor, typename OnPart, typename OnTile>
  void for_anchors(OnAnchor&& on_anchor, OnPart&& on_part, OnTile&& on_tile) {
    const Block<const A> all = constant(pool_.block().columns(0, pool_.width));
    for (int64_t first = begin_; first < end_; first += tile_rows_) {
      const int64_t count = std::min(tile_rows_, end_ - first);
      const auto row_of_thread = [&] { return Row<A>(pool_.n); };
      parallel_for(0, count, kRowsPerTask, row_of_thread, [&](Row<A>& row, int64_t begin, int64_t end) {
        const Block<A> part{tile_ + begin * pool_.n, end - begin, pool_.n, pool_.n};
        multiply(part, {pool_.rows + (first + begin) * pool_.padded, part.rows, pool_.width, pool_.padded},
                 all.transposed());
        for (int64_t i = begin; i < end; ++i) on_anchor(first + i, i, tile_ + i * pool_.n, row);
        on_part(first + begin, part.rows, part);
      });
      on_tile(first, count);
    }
  }

  // Turns products into distances and fills the scratch memory; nullopt where a label gap is NaN.
  std::optional<Similarities> prepare(int64_t self, A* distance, Row<A>& row) const {
    const int64_t n = pool_.n;
    row.near.clear();
    distance[self] = -std::numeric_limits<A>::infinity();  // never near; replaced by a neighbour's distance below
    if (distances(distance, pool_.square, self, n) > 0)
      for (int64_t j = 0; j < n; ++j)
        if (distance[j] < 0 && j != self) {
          row.near.push_back(static_cast<int32_t>(j));
          distance[j] =
              static_cast<A>(distance_between(pool_.original(self), pool_.original(j), pool_.width) * pool_.to_units);
        }
    const int64_t neighbour = self ? self - 1 : 1;
    distance[self] = distance[neighbour];
    if (is_far(self)) {
      row.offset.resize(n);
      for (int64_t j = 0; j < n; ++j) row.offset[j] = offset(self, j == self ? neighbour : j, distance[j]);
    }
    const A* relative = offsets(self, distance, row);
    const Similarities below = exponentials(relative, slope_, self, n, row.weight.data());
    if (!is_narrow(below)) similarities_below_top(relative, slope_, n, row.weight.data());
    if (!labels_.order(self, row.order)) return std::nullopt;
    return below;
  }

  bool is_far(int64_t self) const { return std::is_same_v<A, double> && pool_.spread.is_far(self); }
  // Distance to row j minus distance to the middle, for a far anchor: distances of such an anchor are too long for
  // their differences to be exact.
  A offset(int64_t self, int64_t j, A distance) const {
    const Spread& spread = pool_.spread;
    const double both = static_cast<double>(distance) / pool_.to_units + spread.norm[self];
    return static_cast<A>(pool_.to_units * offset_from(pool_.original(self), pool_.original(j),
                                                       pool_.original(spread.middle), pool_.width, 1 / both));
  }
  const A* offsets(int64_t self, const A* distance, const Row<A>& row) const {
    return is_far(self) ? row.offset.data() : distance;
  }

  static bool is_narrow(const Similarities& below) { return below.range <= kNarrow<A>; }

  double sums(Row<A>& row, const Similarities& below) const {
    return is_narrow(below) ? running_sums(row, pool_.n - 1) : running_logarithms(row, pool_.n - 1);
  }

  // The row becomes the factors a_j of e_self - e_j in the gradient; near pairs go to the list, and their factors in
  // the row become 0. Returns Σ slope · distance.
  double factors(int64_t self, A* distance, Row<A>& row, A scale, std::vector<NearPair<A>>& near) const {
    near.clear();
    const std::optional<Similarities> below = prepare(self, distance, row);
    if (!below) {
      std::fill_n(distance, pool_.n, std::numeric_limits<A>::quiet_NaN());
      return std::numeric_limits<double>::quiet_NaN();
    }
    sums(row, *below);
    is_narrow(*below) ? gradient_of_sums(row, pool_.n - 1) : gradient_of_logarithms(row, pool_.n - 1);
    row.weight[self] = 0;
    // Slopes add up to 0, so that distances may be taken relative to the nearest.
    const double sum = weighted_distances(row.weight.data(), offsets(self, distance, row), below->nearest, pool_.n);
    constexpr A kNoFactor = std::numeric_limits<A>::infinity();
    for (int32_t j : row.near) {
      if (distance[j] != 0) near.push_back({j, scale * row.weight[j] / distance[j]});
      distance[j] = kNoFactor;
    }
    distance[self] = kNoFactor;
    divide_by_distance(row.weight.data(), scale, distance, pool_.n);
    return sum;
  }

  // Each task owns columns, so that the order of the sums is fixed.
  void add_near(int64_t first, int64_t count, const std::vector<std::vector<NearPair<A>>>& near, A* sums) const {
    const int64_t padded = pool_.padded;
    parallel_for(0, pool_.width, 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count; ++i)
        for (const NearPair<A>& pair : near[i])
          add_difference(pair.factor, pool_.to_units, pool_.original(first + i), pool_.original(pair.other), begin, end,
                         sums + (first + i) * padded, sums + pair.other * padded);
    });
  }

  Centred<T, A> pool_;
  const Labels& labels_;
  int64_t begin_, end_;
  double temperature_;
  A slope_;  // 1 / temperature of distances in units
  int64_t tile_rows_;
  Scratch memory_;
  A* tile_;
};

double read_temperature(const char* op, const Problem& problem) {
  if (!problem.learned_temperature) return problem.temperature;
  const double value = *problem.learned_temperature->const_data_ptr<double>();
  check_temperature(op, "temperature", value);
  return value;
}

// Calls body(sweep, 1 / pairs) if there are any pairs.
template <typename T, typename Body>
void with_sweep(const char* op, const Problem& problem, Body&& body) {
  const double temperature = read_temperature(op, problem);
  const std::unique_ptr<Labels> labels = labels_of(op, problem);
  const double n = static_cast<double>(labels->count());
  if (n < 2) return;
  const Spread spread(problem.embeddings.const_data_ptr<T>(), labels->sample(), problem.width);
  // Similarities, or slopes, beyond this could leave the range of float32.
  const bool too_steep = !(std::max(spread.largest, 1.0) / temperature <= 0x1p100);
  const double share = 1 / (n * (n - 1));
  if (std::is_same_v<T, double> || too_steep || spread.any_far()) {
    Sweep<T, double> sweep(problem, *labels, spread, temperature);
    body(sweep, share);
  } else {
    Sweep<T, acc_t<T>> sweep(problem, *labels, spread, temperature);
    body(sweep, share);
  }
}

void forward(const char* op, const Problem& problem, Tensor& out) {
  torch::stable::zero_(out);
  dispatch_floating(problem.embeddings.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_sweep<T>(op, problem, [&](auto& sweep, double share) {
      *out.mutable_data_ptr<acc_t<T>>() = static_cast<acc_t<T>>(share * sweep.loss());
    });
  });
}

void backward(const char* op, const Problem& problem, const Tensor& grad_out, Tensor& grad_embeddings,
              Tensor& grad_temperature) {
  torch::stable::zero_(grad_embeddings);
  torch::stable::zero_(grad_temperature);
  dispatch_floating(problem.embeddings.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_sweep<T>(op, problem, [&](auto& sweep, double share) {
      const double of_temperature =
          sweep.gradient(share * *grad_out.const_data_ptr<double>(), grad_embeddings.mutable_data_ptr<T>());
      if (problem.learned_temperature) *grad_temperature.mutable_data_ptr<double>() = of_temperature;
    });
  });
}

using Operators = RankOperators<forward, backward>;

}  // namespace
}  // namespace msacore::rank_n_contrast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def(
      "rank_n_contrast(Tensor embeddings, Tensor targets, Tensor? learned_temperature, Tensor? mask, *, float "
      "temperature, int anchor_begin, int anchor_count) -> Tensor");
  m.def(
      "rank_n_contrast_backward(Tensor grad_out, Tensor embeddings, Tensor targets, Tensor? learned_temperature, "
      "Tensor? mask, *, float temperature, int anchor_begin, int anchor_count) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  m.impl("rank_n_contrast", TORCH_BOX(&msacore::rank_n_contrast::cpu::Operators::rank_n_contrast));
  m.impl("rank_n_contrast_backward", TORCH_BOX(&msacore::rank_n_contrast::cpu::Operators::rank_n_contrast_backward));
}
