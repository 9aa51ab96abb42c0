// Hierarchical contrastive loss: what the operator accepts, on every device.
#pragma once
#include <string>
#include <vector>

#include "core/optional.h"

namespace msacore::hierarchical_contrastive {
using msacore::contiguous;

constexpr int64_t kTiers = 3;
constexpr int64_t kMostModalities = 64;

struct Inputs {
  std::vector<Tensor> unimodal;
  Tensor fused;
  std::vector<Tensor> high_level;
  OptionalTensor available, labels;

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
  bool intra_modal;
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
  for (double value : options.temperatures) check_temperature(op, "temperatures", value);
  return {n, modalities, pairs, (options.intra_modal ? modalities : pairs) + modalities + pairs_of(pairs)};
}

// The gradients of loss and tiers, and what the forward pass saved.
inline void check_saved(const char* op, const Sizes& s, ScalarType dtype, const OptionalTensor& grad_loss,
                        const OptionalTensor& grad_tiers, const Tensor& stats) {
  if (grad_loss) {
    check_dtype(*grad_loss, op, "grad_loss", dtype);
    check_shape(*grad_loss, op, "grad_loss", {}, "[]");
  }
  if (grad_tiers) {
    check_dtype(*grad_tiers, op, "grad_tiers", dtype);
    check_shape(*grad_tiers, op, "grad_tiers", {kTiers}, "[3]");
  }
  check_dtype(stats, op, "stats", dtype);
  check_shape(stats, op, "stats", {s.terms, 2, 3, s.samples}, "[T, 2, 3, N]");
}

inline std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> out;
  for (const Tensor& t : tensors) out.push_back(torch::stable::contiguous(t));
  return out;
}

inline Inputs contiguous(const Inputs& in) {
  return {contiguous(in.unimodal), torch::stable::contiguous(in.fused), contiguous(in.high_level),
          contiguous(in.available), contiguous(in.labels)};
}

// One per embedding, in the order of the arguments.
inline std::vector<Tensor> new_gradients(const Inputs& in) {
  std::vector<Tensor> grads;
  for (const Tensor& t : in.embeddings()) grads.push_back(torch::stable::new_empty(t, {t.size(0), t.size(1)}));
  return grads;
}

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
