// Rank-N-Contrast on the CPU: tiles of anchors against all samples, so that no N × N matrix exists.
#include "rank_n_contrast/rank_n_contrast.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "core/dtype.h"
#include "cpu/gemm.h"
#include "rank_n_contrast/rank_n_contrast_rows.h"

namespace msacore::rank_n_contrast::cpu {
using namespace msacore::cpu;
namespace {

constexpr int64_t kTileElements = 1 << 19, kLeastTileRows = 32;
constexpr int64_t kGrain = 16384;
constexpr int64_t kRowsPerTask = 8;

// The unmasked samples by rising target, NaN last.
template <typename Target>
struct Ranked {
  std::vector<int64_t> sample;
  std::vector<acc_t<Target>> target;

  Ranked(const Target* targets, const bool* mask, int64_t count) {
    sample.reserve(count);
    for (int64_t i = 0; i < count; ++i)
      if (!mask || mask[i]) sample.push_back(i);
    std::stable_sort(sample.begin(), sample.end(), [&](int64_t a, int64_t b) {
      const auto left = static_cast<acc_t<Target>>(targets[a]), right = static_cast<acc_t<Target>>(targets[b]);
      return left < right || (left == left && right != right);
    });
    target.reserve(sample.size());
    for (int64_t i : sample) target.push_back(static_cast<acc_t<Target>>(targets[i]));
  }
};

// Their embeddings in that order, less the mean, which changes no distance and keeps the expanded squares accurate.
// A last column of ones makes a product with them a row sum too.
template <typename T>
struct Centred {
  using A = acc_t<T>;
  const T* embeddings;
  const std::vector<int64_t>& sample;
  int64_t n, width;
  Tensor rows;  // [n, d + 1]
  std::vector<A> square;

  Centred(const Tensor& source, const std::vector<int64_t>& sample)
      : embeddings(source.const_data_ptr<T>()),
        sample(sample),
        n(static_cast<int64_t>(sample.size())),
        width(source.size(1)),
        rows(torch::stable::new_empty(source, {n, width + 1}, acc_dtype(source.scalar_type()))),
        square(n, 0) {
    std::vector<double> mean(width, 0);
    for (int64_t i : sample)
      for (int64_t c = 0; c < width; ++c) mean[c] += static_cast<A>(embeddings[i * width + c]);
    for (double& m : mean) m /= static_cast<double>(n);
    A* out = rows.mutable_data_ptr<A>();
    for (int64_t p = 0; p < n; ++p, out += width + 1) {
      for (int64_t c = 0; c < width; ++c) {
        out[c] = static_cast<A>(original(p)[c]) - static_cast<A>(mean[c]);
        square[p] += out[c] * out[c];
      }
      out[width] = 1;
    }
  }
  const T* original(int64_t p) const { return embeddings + sample[p] * width; }
};

// Two samples so close that their term of the gradient is added as a difference, not through the products.
template <typename A>
struct NearPair {
  int64_t other;
  A factor;
};

// Walks over tiles of anchors. A tile holds a row per anchor: products, then distances, then factors of the gradient.
template <typename T, typename Target>
class Sweep {
  using A = acc_t<T>;

 public:
  Sweep(const Tensor& embeddings, const Ranked<Target>& ranked, double temperature)
      : pool_(embeddings, ranked.sample),
        target_(ranked.target.data()),
        inverse_temperature_(static_cast<A>(1 / temperature)),
        tile_rows_(std::min(pool_.n, std::max(kLeastTileRows, kTileElements / pool_.n))),
        tile_(torch::stable::new_empty(pool_.rows, {tile_rows_, pool_.n})) {}

  double loss() {
    std::vector<double> losses(pool_.n);
    for_anchors(
        [&](int64_t self, A* distance, Row<A>& row) {
          const std::optional<Similarities> below = prepare(self, distance, row);
          losses[self] = below ? below->fall + sums(row, *below) : std::numeric_limits<double>::quiet_NaN();
        },
        [](int64_t, int64_t) {});
    return std::accumulate(losses.begin(), losses.end(), 0.0);
  }

  // `scale` times the gradient of loss(), into the rows of the samples.
  void gradient(A scale, T* out) {
    const int64_t n = pool_.n, padded = pool_.width + 1;
    // Per sample Σ a (e_other - mean) and, in the last column, Σ a, over both ends of each pair's factor a.
    Tensor sum = torch::stable::new_zeros(pool_.rows, {n, padded});
    Tensor product = torch::stable::new_empty(pool_.rows, {n, padded});
    A* sums = sum.mutable_data_ptr<A>();
    std::vector<std::vector<NearPair<A>>> near(tile_rows_);
    for_anchors(
        [&](int64_t self, A* distance, Row<A>& row) {
          factors(self, distance, row, -scale * inverse_temperature_, near[self % tile_rows_]);
        },
        [&](int64_t first, int64_t count) {
          const Tensor tile = torch::stable::narrow(tile_, 0, 0, count);
          Tensor of_anchors = torch::stable::narrow(product, 0, 0, count);
          mm_out(of_anchors, tile, pool_.rows);
          add(sums + first * padded, of_anchors.const_data_ptr<A>(), count * padded);
          mm_out(product, torch::stable::transpose(tile, 0, 1), torch::stable::narrow(pool_.rows, 0, first, count));
          add(sums, product.const_data_ptr<A>(), n * padded);
          add_near(first, count, near, sums);
        });
    const A* rows = pool_.rows.template const_data_ptr<A>();
    for (int64_t p = 0; p < n; ++p, rows += padded, sums += padded)
      for (int64_t c = 0; c < pool_.width; ++c)
        out[pool_.sample[p] * pool_.width + c] = static_cast<T>(sums[pool_.width] * rows[c] - sums[c]);
  }

 private:
  // on_anchor(self, its row of the tile, scratch) for every anchor, in parallel; on_tile(first, count) after each tile.
  template <typename OnAnchor, typename OnTile>
  void for_anchors(OnAnchor&& on_anchor, OnTile&& on_tile) {
    Tensor all = torch::stable::narrow(pool_.rows, 1, 0, pool_.width);
    for (int64_t first = 0; first < pool_.n; first += tile_rows_) {
      const int64_t count = std::min(tile_rows_, pool_.n - first);
      Tensor products = torch::stable::narrow(tile_, 0, 0, count);
      mm_out(products, torch::stable::narrow(all, 0, first, count), torch::stable::transpose(all, 0, 1));
      A* tile = tile_.template mutable_data_ptr<A>();
      torch::stable::parallel_for(0, count, kRowsPerTask, [&](int64_t begin, int64_t end) {
        Row<A> row(pool_.n);
        for (int64_t i = begin; i < end; ++i) on_anchor(first + i, tile + i * pool_.n, row);
      });
      on_tile(first, count);
    }
  }

  // Turns products into distances and fills the scratch; nothing where a label gap is no number.
  std::optional<Similarities> prepare(int64_t self, A* distance, Row<A>& row) const {
    const int64_t n = pool_.n;
    row.near.clear();
    distance[self] = -std::numeric_limits<A>::infinity();  // never near; it stands in for a neighbour below
    if (distances(distance, pool_.square.data(), self, n) > 0)
      for (int64_t j = 0; j < n; ++j)
        if (distance[j] < 0) {
          row.near.push_back(static_cast<int32_t>(j));
          distance[j] = distance_between(pool_.original(self), pool_.original(j), pool_.width);
        }
    distance[self] = distance[self ? self - 1 : 1];
    const Similarities below = exponentials(distance, inverse_temperature_, self, n, row.weight.data());
    if (!is_narrow(below)) similarities_below_top(distance, inverse_temperature_, n, row.weight.data());
    if (!label_gaps<Target>(target_, self, n, row.gap.data())) return std::nullopt;
    merge_by_gap(row.gap.data(), self, n, row.order.data());
    return below;
  }

  static bool is_narrow(const Similarities& below) { return below.range <= kNarrow<A>; }

  double sums(Row<A>& row, const Similarities& below) const {
    return is_narrow(below) ? running_sums(row, pool_.n - 1) : running_logarithms(row, pool_.n - 1);
  }

  // The row becomes a_j, with which e_self - e_j enters the gradient; near pairs go to the list and become 0.
  void factors(int64_t self, A* distance, Row<A>& row, A scale, std::vector<NearPair<A>>& near) const {
    near.clear();
    const std::optional<Similarities> below = prepare(self, distance, row);
    if (!below) return std::fill(distance, distance + pool_.n, std::numeric_limits<A>::quiet_NaN());
    sums(row, *below);
    is_narrow(*below) ? gradient_of_sums(row, pool_.n - 1) : gradient_of_logarithms(row, pool_.n - 1);
    constexpr A kNoFactor = std::numeric_limits<A>::infinity();
    for (int32_t j : row.near) {
      if (distance[j] > 0) near.push_back({j, scale * row.weight[j] / distance[j]});
      distance[j] = kNoFactor;
    }
    distance[self] = kNoFactor;
    divide_by_distance(row.weight.data(), scale, distance, pool_.n);
  }

  // A task owns columns, so that the order of the sums is fixed.
  void add_near(int64_t first, int64_t count, const std::vector<std::vector<NearPair<A>>>& near, A* sums) const {
    const int64_t padded = pool_.width + 1;
    torch::stable::parallel_for(0, pool_.width, 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count; ++i)
        for (const NearPair<A>& pair : near[i]) {
          const T *own = pool_.original(first + i), *other = pool_.original(pair.other);
          A *to_own = sums + (first + i) * padded, *to_other = sums + pair.other * padded;
          for (int64_t c = begin; c < end; ++c) {
            const A term = pair.factor * (static_cast<A>(own[c]) - static_cast<A>(other[c]));
            to_own[c] -= term;
            to_other[c] += term;
          }
        }
    });
  }

  static void add(A* to, const A* from, int64_t count) {
    torch::stable::parallel_for(0, count, kGrain, [&](int64_t b, int64_t e) { add_range(to, from, b, e); });
  }

  Centred<T> pool_;
  const acc_t<Target>* target_;
  A inverse_temperature_;
  int64_t tile_rows_;
  Tensor tile_;
};

// Calls body(sweep, 1 / pairs) where there are pairs at all.
template <typename T, typename Body>
void with_sweep(const char* op, const Inputs& in, double temperature, Body&& body) {
  dispatch_floating(in.targets.scalar_type(), op, [&](auto target_tag) {
    using Target = typename decltype(target_tag)::type;
    const Ranked<Target> ranked(in.targets.const_data_ptr<Target>(),
                                in.mask ? in.mask->const_data_ptr<bool>() : nullptr, in.targets.size(0));
    const double n = static_cast<double>(ranked.sample.size());
    if (n < 2) return;
    Sweep<T, Target> sweep(in.embeddings, ranked, temperature);
    body(sweep, 1 / (n * (n - 1)));
  });
}

Tensor forward_cpu(const Tensor& embeddings, const Tensor& targets, const std::optional<Tensor>& mask,
                   double temperature) {
  constexpr const char* op = "rank_n_contrast";
  const Inputs given{embeddings, targets, mask};
  check_inputs(op, given, temperature);
  const Inputs in = contiguous(given);
  Tensor out = torch::stable::new_zeros(embeddings, {}, acc_dtype(embeddings.scalar_type()));
  dispatch_floating(embeddings.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_sweep<T>(op, in, temperature, [&](auto& sweep, double share) {
      *out.mutable_data_ptr<acc_t<T>>() = static_cast<acc_t<T>>(share * sweep.loss());
    });
  });
  return out;
}

Tensor backward_cpu(const Tensor& grad_out, const Tensor& embeddings, const Tensor& targets,
                    const std::optional<Tensor>& mask, double temperature) {
  constexpr const char* op = "rank_n_contrast_backward";
  const Inputs given{embeddings, targets, mask};
  const Sizes s = check_inputs(op, given, temperature);
  check_gradient(op, given, grad_out);
  const Inputs in = contiguous(given);
  Tensor grad = torch::stable::new_zeros(embeddings, {s.samples, s.width});
  dispatch_floating(embeddings.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    with_sweep<T>(op, in, temperature, [&](auto& sweep, double share) {
      sweep.gradient(static_cast<A>(*grad_out.const_data_ptr<A>() * share), grad.mutable_data_ptr<T>());
    });
  });
  return grad;
}

}  // namespace
}  // namespace msacore::rank_n_contrast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def("rank_n_contrast(Tensor embeddings, Tensor targets, Tensor? mask, *, float temperature) -> Tensor");
  m.def(
      "rank_n_contrast_backward(Tensor grad_out, Tensor embeddings, Tensor targets, Tensor? mask, *, float "
      "temperature) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  m.impl("rank_n_contrast", TORCH_BOX(&msacore::rank_n_contrast::cpu::forward_cpu));
  m.impl("rank_n_contrast_backward", TORCH_BOX(&msacore::rank_n_contrast::cpu::backward_cpu));
}
