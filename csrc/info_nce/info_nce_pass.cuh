// InfoNCE on CUDA as one term between two sides: the memory that the sides live in, and their preparation.
#pragma once
#include "contrastive/cuda/classes.cuh"
#include "contrastive/cuda/launch.cuh"
#include "info_nce/info_nce.h"
#include "info_nce/info_nce_kernels.cuh"

namespace msacore::info_nce::cuda {
using namespace contrastive::cuda;
using contrastive::cuda::Denominator;  // info_nce::Denominator holds the operator's codes

inline Denominator denominator_of(const InfoNceOptions& options) {
  return options.denominator == info_nce::kAll         ? Denominator::kAll
         : options.denominator == info_nce::kNegatives ? Denominator::kNegatives
                                                       : Denominator::kDecoupled;
}

// For anchors that are a part of a batch: the candidate that is anchor 0 and, for the gradients, how many anchors and
// candidates of the whole batch take part, and the gradients of the losses of rows and columns, one number or one per
// row.
template <typename A>
struct PartOfBatch {
  int64_t diagonal;
  const int64_t* used[2];
  const A* scale[2];
  bool per_row[2];
};

// The loss as one term, and the memory its two sides live in. The negatives, which all anchors share, follow the
// candidates.
template <typename T>
struct Pass {
  using A = acc_t<T>;
  T* units[2];
  A *factors[2], *gradients[2];
  InverseNorm<A>* norms[2];
  int64_t* counts;
  double *losses, *slopes;
  Scratch scratch;
  Terms<T, 1> terms;
  std::optional<Classes> classes;  // where positives are sums over classes

  // In the backward pass, `row_stats` are those of the forward pass; `column_stats` is null where columns are not
  // anchors.
  Pass(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
       const A* row_stats, const A* column_stats, const A* grad_out, cudaStream_t stream,
       const PartOfBatch<A>* part = nullptr)
      : scratch(in.anchors, [&](Scratch& memory) {
          const int64_t width = padded(s.width, 32);
          const int64_t rows[2] = {padded(s.anchors, kTile), padded(s.candidates + s.negatives, kTile)};
          for (int r = 0; r < 2; ++r) {
            memory.take(units[r], rows[r] * width);
            memory.take(factors[r], rows[r]);
            memory.take(norms[r], rows[r]);
            memory.take(gradients[r], grad_out ? rows[r] * width : 0);
          }
          memory.take(counts, 4);
          memory.take(losses, grad_out ? 0 : s.anchors + s.candidates);
          memory.take(slopes,
                      grad_out && (in.learned_temperature || part) ? int64_t{tiles(rows[0])} * tiles(rows[1]) : 0);
        }) {
    const auto side = [&](int r, const Tensor& x, const OptionalTensor& labels, int64_t negatives, const A* stats) {
      Side<T> side{};
      side.x = x.const_data_ptr<T>();
      side.n = x.size(0);
      side.d = s.width;
      side.rows = padded(side.n + negatives, kTile);
      side.width = padded(s.width, 32);
      side.unit = units[r];
      side.factor = factors[r];
      side.inverse_norm = norms[r];
      side.gradient = gradients[r];
      side.labels = data_or_null<int64_t>(labels);
      side.counts = counts + 2 * r;
      side.stats = stats;
      return side;
    };
    Problem<T>& problem = terms.at[0];
    problem = {};
    problem.a = side(0, in.anchors, in.anchor_labels, 0, row_stats);
    problem.b = side(1, in.candidates ? *in.candidates : in.anchors, in.candidate_labels, s.negatives, column_stats);
    problem.temperature = temperature_of(op, in.learned_temperature, options.temperature);
    problem.weights = data_or_null<T>(in.weights);
    problem.two_sided = options.symmetric;
    problem.exclude_self = options.exclude_self;
    problem.unit_rows = options.normalize;
    problem.denominator = denominator_of(options);
    const bool apart = problem.denominator != Denominator::kAll;
    if (!apart && !part && by_classes(problem.a.labels, s.anchors, s.candidates))
      classes.emplace(problem.a.labels, s.anchors, problem.b.labels, s.candidates, in.anchors, stream);
    // Decided by the arguments, not by their pointers, which may be null without rows.
    problem.pairwise = apart || part || in.weights || (in.anchor_labels && !classes);
    problem.gradient.out = problem.gradient.column_out = grad_out;
    problem.gradient.weight = 1;
    problem.gradient.scale = problem.two_sided ? 0.5 : 1;
    problem.gradient.mean = options.reduction == kMean;
    problem.gradient.per_anchor = problem.gradient.per_column = options.reduction == kNone;
    if (part) {
      problem.offset = part->diagonal;
      problem.gradient.scale = 1;
      problem.gradient.out = part->scale[0];
      problem.gradient.column_out = part->scale[1];
      problem.gradient.per_anchor = part->per_row[0];
      problem.gradient.per_column = part->per_row[1];
    }
    const Roles<T> roles{{problem.a, problem.b},
                         {data_or_null<bool>(in.anchor_mask), data_or_null<bool>(in.candidate_mask)},
                         data_or_null<T>(in.negatives),
                         data_or_null<bool>(in.negative_mask),
                         s.negatives,
                         options.normalize,
                         {part ? part->used[0] : nullptr, part ? part->used[1] : nullptr}};
    const unsigned blocks = grid_for(std::max(problem.a.rows, problem.b.rows), kRowThreads / kWarp).x;
    launch(prepare_kernel<T>, dim3(blocks + 1, 2), dim3(kRowThreads), 0, stream, roles);
  }

  // The first sweep keeps the similarities for the others in `kept` [R, R'], unless that is empty.
  void keep(const Tensor& kept) {
    Problem<T>& problem = terms.at[0];
    problem.kept = kept_data<A>(kept);
    if (!problem.kept) return;
    problem.kept_rows = static_cast<int>(kept.size(0));
    problem.kept_columns = static_cast<int>(kept.size(1));
  }
};

// Gradients of similarities in memory: bfloat16 where the rows are bfloat16, so that the products run at full speed;
// float32 for float16, whose range would not suffice.
template <typename T>
using KeptGradient = Kept<std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, acc_t<T>>, 1>;

// `count` rows of a side from `first` on, with the fields that project_kernel reads.
template <typename T>
Side<T> rows_from(Side<T> side, int64_t first, int64_t count) {
  side.n = count;
  side.unit += first * side.width;
  side.factor += first;
  side.inverse_norm += first;
  side.gradient += first * side.width;
  return side;
}

}  // namespace msacore::info_nce::cuda
