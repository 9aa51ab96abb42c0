// Hierarchical contrastive loss: what the operators accept and return, on every device.
#pragma once
#include <string>
#include <tuple>
#include <vector>

#include "core/allocate.h"
#include "core/dtype.h"
#include "core/optional.h"
#include "core/round.h"

namespace msacore::hierarchical_contrastive {
using msacore::contiguous;

constexpr int64_t kTiers = 3;
constexpr int64_t kMostModalities = 64;

struct Inputs {
  std::vector<Tensor> unimodal;
  Tensor fused;
  std::vector<Tensor> high_level;
  OptionalTensor available, labels;
  OptionalTensor learned_temperatures[kTiers];  // each takes the place of its number in Options

  // The sides of the terms: modalities, then fused, then pairs.
  std::vector<Tensor> embeddings() const {
    std::vector<Tensor> all = unimodal;
    all.push_back(fused);
    all.insert(all.end(), high_level.begin(), high_level.end());
    return all;
  }
};

struct Options {
  std::vector<double> tier_weights, temperatures;
  bool intra_modal, normalize;
};

struct Sizes {
  int64_t samples, modalities, pairs, terms;
};

inline int64_t pairs_of(int64_t count) { return count * (count - 1) / 2; }

inline Sizes check_inputs(const char* op, const Inputs& in, const Options& options) {
  const int64_t modalities = static_cast<int64_t>(in.unimodal.size()), pairs = pairs_of(modalities);
  check(modalities >= 1 && modalities <= kMostModalities, op, "expected `unimodal` to hold 1 to ", kMostModalities,
        " tensors, got ", modalities);
  check(static_cast<int64_t>(in.high_level.size()) == pairs, op, "expected `high_level` to hold M(M-1)/2 = ", pairs,
        " tensors, got ", in.high_level.size());
  const Tensor& first = in.unimodal.front();
  check_floating(first, op, "unimodal[0]");
  check_shape(first, op, "unimodal[0]", {-1, -1}, "[N, d]");
  const int64_t n = first.size(0), d = first.size(1);
  const auto check_embedding = [&](const Tensor& t, const std::string& name, int64_t width, const char* meaning) {
    check_dtype(t, op, name, first.scalar_type());
    check_shape(t, op, name, {n, width}, meaning);
    check_device(t, op, name, first);
  };
  for (int64_t m = 1; m < modalities; ++m)
    check_embedding(in.unimodal[m], "unimodal[" + std::to_string(m) + "]", d, "[N, d]");
  check_embedding(in.fused, "fused", d, "[N, d]");
  for (int64_t p = 0; p < pairs; ++p)
    check_embedding(in.high_level[p], "high_level[" + std::to_string(p) + "]", p ? in.high_level[0].size(1) : -1,
                    "[N, d3]");
  if (in.available) {
    check_dtype(*in.available, op, "available", ScalarType::Bool);
    check_shape(*in.available, op, "available", {n, modalities}, "[N, M]");
    check_device(*in.available, op, "available", first);
  }
  check(in.labels || !options.intra_modal, op, "expected `labels` with `tier1` \"intra_modal\", got none");
  check_rows(op, in.labels, "labels", ScalarType::Long, n, "[N]", first);
  check(options.tier_weights.size() == kTiers, op, "expected `tier_weights` to hold 3 numbers, got ",
        options.tier_weights.size());
  check(options.temperatures.size() == kTiers, op, "expected `temperatures` to hold 3 numbers, got ",
        options.temperatures.size());
  for (int64_t k = 0; k < kTiers; ++k) {
    const OptionalTensor& learned = in.learned_temperatures[k];
    if (!learned) {
      check_temperature(op, "temperatures", options.temperatures[k]);
      continue;
    }
    const std::string name = "temperatures[" + std::to_string(k) + "]";
    check_floating(*learned, op, name);
    check_shape(*learned, op, name, {}, "[] (0-d)");
    check_device(*learned, op, name, first);
  }
  return {n, modalities, pairs, (options.intra_modal ? modalities : pairs) + modalities + pairs_of(pairs)};
}

// Statistics per term, direction (rows of the first side, rows of the second) and sample: those that info_nce.h calls
// kHighest, kLog, kPositive and kTotal.
constexpr int64_t kStats = 4;

// With few samples, the forward pass keeps the similarities of the terms, or their exponentials, for the backward pass:
// [R, R] per term, where R is the number of samples padded to 16.
constexpr int64_t kMostKept = int64_t{1} << 22;  // numbers
inline std::vector<int64_t> kept_shape(const Sizes& s, const Options& options, bool keep) {
  const int64_t rows = round_up<int64_t>(s.samples, 16);
  if (!keep || options.intra_modal || s.terms * rows * rows > kMostKept) return {0};
  return {s.terms, rows, rows};
}

// Checks the gradients of loss and tiers and what the forward pass saved.
inline void check_saved(const char* op, const Sizes& s, const Options& options, const Tensor& like,
                        const OptionalTensor& grad_loss, const OptionalTensor& grad_tiers, const Tensor& stats,
                        const Tensor& kept) {
  const ScalarType dtype = acc_dtype(like.scalar_type());
  if (grad_loss) {
    check_dtype(*grad_loss, op, "grad_loss", dtype);
    check_shape(*grad_loss, op, "grad_loss", {}, "[]");
    check_device(*grad_loss, op, "grad_loss", like);
  }
  if (grad_tiers) {
    check_dtype(*grad_tiers, op, "grad_tiers", dtype);
    check_shape(*grad_tiers, op, "grad_tiers", {kTiers}, "[3]");
    check_device(*grad_tiers, op, "grad_tiers", like);
  }
  check_dtype(stats, op, "stats", dtype);
  check_shape(stats, op, "stats", {s.terms, 2, kStats, s.samples}, "[T, 2, 4, N]");
  check_device(stats, op, "stats", like);
  check_dtype(kept, op, "kept", dtype);
  check_device(kept, op, "kept", like);
  const std::vector<int64_t> full = kept_shape(s, options, true);
  if (kept.dim() == 1 || full.size() == 1)
    check_shape(kept, op, "kept", {0}, "[0]");
  else
    check_shape(kept, op, "kept", {full[0], full[1], full[2]}, "[T, R, R]");
}

inline std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> out;
  for (const Tensor& t : tensors) out.push_back(as_contiguous(t));
  return out;
}

inline Inputs contiguous(const Inputs& in) {
  return {contiguous(in.unimodal),
          as_contiguous(in.fused),
          contiguous(in.high_level),
          contiguous(in.available),
          contiguous(in.labels),
          {contiguous(in.learned_temperatures[0]), contiguous(in.learned_temperatures[1]),
           contiguous(in.learned_temperatures[2])}};
}

struct Results {
  Tensor loss, tiers, stats, kept;

  Results(const Tensor& like, const Sizes& s, const Options& options, bool keep) {
    const ScalarType dtype = acc_dtype(like.scalar_type());
    loss = empty_tensor(like, {}, dtype);
    tiers = empty_tensor(like, {kTiers}, dtype);
    stats = empty_tensor(like, {s.terms, 2, kStats, s.samples}, dtype);
    kept = empty_tensor(like, kept_shape(s, options, keep), dtype);
  }
};

// Gradients of the embeddings, in the order of the arguments, and of the temperatures; empty for temperatures that are
// plain numbers.
struct Gradients {
  std::vector<Tensor> embeddings;
  Tensor temperatures[kTiers];

  explicit Gradients(const Inputs& in) {
    for (const Tensor& t : in.embeddings()) embeddings.push_back(empty_tensor(t, {t.size(0), t.size(1)}));
    for (int64_t k = 0; k < kTiers; ++k)
      temperatures[k] =
          in.learned_temperatures[k] ? empty_tensor(*in.learned_temperatures[k], {}) : empty_tensor(in.fused, {0});
  }
};

// The operators of a device: `forward` and `backward` get contiguous arguments that were checked.
template <void (*forward)(const char* op, const Inputs&, const Sizes&, const Options&, Results&),
          void (*backward)(const char* op, const Inputs&, const Sizes&, const Options&, const OptionalTensor& grad_loss,
                           const OptionalTensor& grad_tiers, const Tensor& stats, const Tensor& kept, Gradients&)>
struct HierarchicalOperators {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> hierarchical_contrastive_loss(
      const std::vector<Tensor>& unimodal, const Tensor& fused, const std::vector<Tensor>& high_level,
      const OptionalTensor& available, const OptionalTensor& labels, const OptionalTensor& learned_temperature_1,
      const OptionalTensor& learned_temperature_2, const OptionalTensor& learned_temperature_3,
      const std::vector<double>& tier_weights, const std::vector<double>& temperatures, bool intra_modal,
      bool normalize, bool keep) {
    constexpr const char* op = "hierarchical_contrastive_loss";
    const Inputs in{unimodal,  fused,  high_level,
                    available, labels, {learned_temperature_1, learned_temperature_2, learned_temperature_3}};
    const Options options{tier_weights, temperatures, intra_modal, normalize};
    const Sizes s = check_inputs(op, in, options);
    Results results(fused, s, options, keep);
    forward(op, contiguous(in), s, options, results);
    return {results.loss, results.tiers, results.stats, results.kept};
  }

  static std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> hierarchical_contrastive_loss_backward(
      const OptionalTensor& grad_loss, const OptionalTensor& grad_tiers, const std::vector<Tensor>& unimodal,
      const Tensor& fused, const std::vector<Tensor>& high_level, const OptionalTensor& available,
      const OptionalTensor& labels, const OptionalTensor& learned_temperature_1,
      const OptionalTensor& learned_temperature_2, const OptionalTensor& learned_temperature_3, const Tensor& stats,
      const Tensor& kept, const std::vector<double>& tier_weights, const std::vector<double>& temperatures,
      bool intra_modal, bool normalize) {
    constexpr const char* op = "hierarchical_contrastive_loss_backward";
    const Inputs given{unimodal,  fused,  high_level,
                       available, labels, {learned_temperature_1, learned_temperature_2, learned_temperature_3}};
    const Options options{tier_weights, temperatures, intra_modal, normalize};
    const Sizes s = check_inputs(op, given, options);
    check_saved(op, s, options, fused, grad_loss, grad_tiers, stats, kept);
    const Inputs in = contiguous(given);
    Gradients grads(in);
    backward(op, in, s, options, contiguous(grad_loss), contiguous(grad_tiers), as_contiguous(stats),
             as_contiguous(kept), grads);
    return {grads.embeddings, grads.temperatures[0], grads.temperatures[1], grads.temperatures[2]};
  }
};

// A term, between two sides.
struct Plan {
  int64_t tier, first, second;
};

inline std::vector<Plan> plan_terms(const Sizes& s, bool intra_modal) {
  std::vector<Plan> plans;
  const int64_t fused = s.modalities;
  if (intra_modal)
    for (int64_t m = 0; m < s.modalities; ++m) plans.push_back({0, m, m});
  else
    for (int64_t m = 0; m < s.modalities; ++m)
      for (int64_t n = m + 1; n < s.modalities; ++n) plans.push_back({0, m, n});
  for (int64_t m = 0; m < s.modalities; ++m) plans.push_back({1, fused, m});
  for (int64_t p = 0; p < s.pairs; ++p)
    for (int64_t q = p + 1; q < s.pairs; ++q) plans.push_back({2, fused + 1 + p, fused + 1 + q});
  return plans;
}

// Which modalities each side needs: bits of a mask.
inline std::vector<uint64_t> needs_of_sides(const Sizes& s) {
  std::vector<uint64_t> needs;
  for (int64_t m = 0; m < s.modalities; ++m) needs.push_back(uint64_t(1) << m);
  needs.push_back(0);
  for (int64_t m = 0; m < s.modalities; ++m)
    for (int64_t n = m + 1; n < s.modalities; ++n) needs.push_back(uint64_t(1) << m | uint64_t(1) << n);
  return needs;
}

}  // namespace msacore::hierarchical_contrastive
