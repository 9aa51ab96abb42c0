// Positives that are all pairs of equal label, through sums over classes: O(N d), and no pair is ever listed.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "contrastive/cpu/sweep.h"

namespace msacore::contrastive::cpu {

// The labels of one side of a term; unlabelled rows are not `used`.
struct Labels {
  const int64_t* value;
  const uint8_t* used;
  int64_t n;
  std::vector<int64_t> order;  // used rows by label, then by index

  Labels(const int64_t* value, const uint8_t* used, int64_t n) : value(value), used(used), n(n) {
    for (int64_t i = 0; i < n; ++i)
      if (used[i]) order.push_back(i);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return value[i] < value[j]; });
  }
  bool holds(int64_t i, int64_t label) const { return i >= 0 && i < n && used[i] && value[i] == label; }
};

struct Class {
  int64_t label, begin, end, other_begin, other_end;  // ranges of Labels::order
};

// Classes that exist on both sides.
inline std::vector<Class> common_classes(const Labels& own, const Labels& other) {
  std::vector<Class> classes;
  const auto end_of = [](const Labels& side, int64_t begin) {
    int64_t end = begin;
    const int64_t size = static_cast<int64_t>(side.order.size());
    while (end < size && side.value[side.order[end]] == side.value[side.order[begin]]) ++end;
    return end;
  };
  int64_t i = 0, j = 0;
  while (i < static_cast<int64_t>(own.order.size()) && j < static_cast<int64_t>(other.order.size())) {
    const int64_t label = own.value[own.order[i]], other_label = other.value[other.order[j]];
    const int64_t i_end = end_of(own, i), j_end = end_of(other, j);
    if (label == other_label) classes.push_back({label, i, i_end, j, j_end});
    if (label <= other_label) i = i_end;
    if (other_label <= label) j = j_end;
  }
  return classes;
}

template <typename A>
MSACORE_SIMD void add_row(double* __restrict__ sum, const A* __restrict__ row, double weight, int64_t d) {
  for (int64_t k = 0; k < d; ++k) sum[k] += weight * row[k];
}

template <typename A, typename B>
MSACORE_SIMD double dot_rows(const A* __restrict__ x, const B* __restrict__ y, int64_t d) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(x[k]) * y[k];
  return sum;
}

// gradient -= own · sum + weighted
template <typename A>
MSACORE_SIMD void attract_row(A* __restrict__ gradient, double own, const double* __restrict__ sum,
                              const double* __restrict__ weighted, int64_t d) {
  for (int64_t k = 0; k < d; ++k) gradient[k] -= static_cast<A>(own * sum[k] + weighted[k]);
}

// Number and mean similarity of the positives of each row of `own`; its row i is row i + offset of `other`.
template <typename A>
void class_positives(const Side<A>& own, const Labels& labels, const Side<A>& other, const Labels& other_labels,
                     bool exclude_self, int64_t offset, Direction<A>& direction) {
  const std::vector<Class> classes = common_classes(labels, other_labels);
  parallel_for(0, static_cast<int64_t>(classes.size()), Side<A>::grain(own.width), [&](int64_t b, int64_t e) {
    std::vector<double> sum(own.d);
    for (int64_t c = b; c < e; ++c) {
      const Class& group = classes[c];
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t k = group.other_begin; k < group.other_end; ++k)
        add_row(sum.data(), other.row(other_labels.order[k]), 1.0, own.d);
      for (int64_t k = group.begin; k < group.end; ++k) {
        const int64_t i = labels.order[k];
        const bool without_self = exclude_self && other_labels.holds(i + offset, group.label);
        const int64_t total = group.other_end - group.other_begin - without_self;
        if (total == 0) continue;
        double positive = dot_rows(own.row(i), sum.data(), own.d);
        if (without_self) positive -= dot_rows(own.row(i), other.row(i + offset), own.d);
        direction.total[i] = static_cast<double>(total);
        direction.positive[i] = positive / static_cast<double>(total);
      }
    }
  });
}

// Gradient of the mean similarity of the positives: each pair (i, j) of a class attracts with attract[i] + attract[j].
template <typename A>
void attract_classes(const Side<A>& own, const Labels& labels, const Direction<A>& direction, const Side<A>& other,
                     const Labels& other_labels, const Direction<A>& other_direction, bool exclude_self,
                     int64_t offset) {
  const std::vector<Class> classes = common_classes(labels, other_labels);
  parallel_for(0, static_cast<int64_t>(classes.size()), Side<A>::grain(own.width), [&](int64_t b, int64_t e) {
    std::vector<double> sum(own.d), weighted(own.d), pull(own.d);
    for (int64_t c = b; c < e; ++c) {
      const Class& group = classes[c];
      std::fill(sum.begin(), sum.end(), 0.0);
      std::fill(weighted.begin(), weighted.end(), 0.0);
      for (int64_t k = group.other_begin; k < group.other_end; ++k) {
        const int64_t j = other_labels.order[k];
        add_row(sum.data(), other.row(j), 1.0, own.d);
        add_row(weighted.data(), other.row(j), other_direction.attract[j], own.d);
      }
      for (int64_t k = group.begin; k < group.end; ++k) {
        const int64_t i = labels.order[k];
        pull = weighted;
        if (exclude_self && other_labels.holds(i + offset, group.label))
          add_row(pull.data(), other.row(i + offset),
                  -static_cast<double>(direction.attract[i] + other_direction.attract[i + offset]), own.d);
        attract_row(own.gradient.get() + i * own.width, direction.attract[i], sum.data(), pull.data(), own.d);
      }
    }
  });
}

}  // namespace msacore::contrastive::cpu
