// The order that the labels give to the samples as one anchor sees them: the others by falling gap, and where groups of
// equal gaps end. The passes over embeddings need nothing else of the labels.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "core/dtype.h"
#include "cpu/buffer.h"
#include "cpu/simd.h"
#include "rank_n_contrast/rank_n_contrast.h"

namespace msacore::rank_n_contrast::cpu {
using namespace msacore::cpu;

__extension__ typedef unsigned __int128 Wide;  // sums of 64-bit gaps

// The type in which labels are subtracted, and that of their gaps. Gaps of integers are exact.
template <typename Target>
struct LabelTypes {
  using Value = acc_t<Target>;
  using Gap = acc_t<Target>;
};
template <>
struct LabelTypes<int64_t> {
  using Value = int64_t;
  using Gap = uint64_t;
};
template <typename Target>
using Value = typename LabelTypes<Target>::Value;

// |a - b| rounded as the dtype of the targets rounds it.
template <typename Target>
MSACORE_INLINE Value<Target> gap_of(Value<Target> a, Value<Target> b) {
  return std::abs(static_cast<Value<Target>>(static_cast<Target>(a - b)));
}
template <>
MSACORE_INLINE int64_t gap_of<int64_t>(int64_t, int64_t) = delete;
MSACORE_INLINE uint64_t integer_gap(int64_t a, int64_t b) {
  const auto left = static_cast<uint64_t>(a), right = static_cast<uint64_t>(b);
  return a > b ? left - right : right - left;
}

// The others in the order in which one anchor sees them, and memory to sort them; one per thread.
struct Order {
  std::vector<int32_t> place;  // [n - 1], by falling gap
  std::vector<uint8_t> ends;   // [n - 1]: whether a group of equal gaps ends here
  std::vector<std::byte> gaps, entries;
  explicit Order(int64_t n) : place(n), ends(n) {}

  template <typename T>
  static T* at_least(std::vector<std::byte>& memory, int64_t count) {
    const size_t bytes = count * sizeof(T);
    if (memory.size() < bytes) memory.resize(bytes);
    return reinterpret_cast<T*>(memory.data());
  }
};

class Labels {
 public:
  virtual ~Labels() = default;
  int64_t count() const { return static_cast<int64_t>(sample_.size()); }
  // The unmasked samples: which one is at each place.
  const std::vector<int64_t>& sample() const { return sample_; }
  // Finds the order of the others for anchor `self`; false where a gap is NaN.
  virtual bool order(int64_t self, Order& order) const = 0;

 protected:
  explicit Labels(const Problem& problem) {
    const bool* mask = data_or_null<bool>(problem.mask);
    sample_.reserve(problem.samples);
    for (int64_t i = 0; i < problem.samples; ++i)
      if (!mask || mask[i]) sample_.push_back(i);
  }
  std::vector<int64_t> sample_;
};

template <typename Target>
MSACORE_SIMD bool line_gaps(const Value<Target>* __restrict__ y, int64_t self, int64_t n,
                            typename LabelTypes<Target>::Gap* __restrict__ gap) {
  const Value<Target> own = y[self];
  if constexpr (std::is_same_v<Target, int64_t>) {
    for (int64_t j = 0; j < n; ++j) gap[j] = integer_gap(own, y[j]);
    return true;
  } else {
    int64_t bad = 0;
    for (int64_t j = 0; j < n; ++j) {
      gap[j] = gap_of<Target>(own, y[j]);
      bad += gap[j] != gap[j];
    }
    return bad == 0;
  }
}

// Merges the two sides of the anchor, from the outside inwards.
template <typename Gap>
MSACORE_SIMD void merge_by_gap(const Gap* __restrict__ gap, int64_t self, int64_t n, int32_t* __restrict__ place,
                               uint8_t* __restrict__ ends) {
  int64_t low = 0, high = n - 1, r = 0;
  while (low < self && high > self) {
    const bool take_low = gap[low] >= gap[high];
    place[r++] = static_cast<int32_t>(take_low ? low : high);
    low += take_low;
    high -= !take_low;
  }
  for (; low < self; ++low) place[r++] = static_cast<int32_t>(low);
  for (; high > self; --high) place[r++] = static_cast<int32_t>(high);
  for (int64_t k = 0; k < n - 2; ++k) ends[k] = gap[place[k]] != gap[place[k + 1]];
  ends[n - 2] = 1;
}

// One label per sample: with the samples in order of label, NaN last, gaps fall from both ends towards an anchor.
template <typename Target>
class Line : public Labels {
 public:
  explicit Line(const Problem& problem) : Labels(problem) {
    const Target* targets = problem.targets.const_data_ptr<Target>();
    const auto value = [&](int64_t i) { return static_cast<Value<Target>>(targets[i]); };
    std::stable_sort(sample_.begin(), sample_.end(), [&](int64_t a, int64_t b) {
      const Value<Target> left = value(a), right = value(b);
      return left < right || (left == left && right != right);
    });
    y_.reserve(sample_.size());
    for (int64_t i : sample_) y_.push_back(value(i));
  }

  bool order(int64_t self, Order& order) const override {
    const int64_t n = count();
    auto* gap = Order::at_least<typename LabelTypes<Target>::Gap>(order.gaps, n);
    if (!line_gaps<Target>(y_.data(), self, n, gap)) return false;
    merge_by_gap(gap, self, n, order.place.data(), order.ends.data());
    return true;
  }

 private:
  std::vector<Value<Target>> y_;
};

template <typename Target, typename Gap>
MSACORE_SIMD void add_gaps(const Value<Target>* __restrict__ y, int64_t self, int64_t n, Gap* __restrict__ gap) {
  const Value<Target> own = y[self];
  for (int64_t j = 0; j < n; ++j) {
    if constexpr (std::is_same_v<Target, int64_t>) {
      gap[j] += integer_gap(own, y[j]);
    } else {
      gap[j] += gap_of<Target>(own, y[j]);
    }
  }
}

template <typename Target>
MSACORE_SIMD bool round_gaps(Value<Target>* __restrict__ gap, int64_t n) {
  int64_t bad = 0;
  for (int64_t j = 0; j < n; ++j) {
    gap[j] = static_cast<Value<Target>>(static_cast<Target>(gap[j]));
    bad += gap[j] != gap[j];
  }
  return bad == 0;
}

// Several labels per sample; the gap is the sum of the labels' gaps, in the order of the labels. Every anchor sorts.
template <typename Target, typename Gap = typename LabelTypes<Target>::Gap>
class Space : public Labels {
 public:
  explicit Space(const Problem& problem) : Labels(problem), labels_(problem.labels), y_(labels_ * count()) {
    const Target* targets = problem.targets.const_data_ptr<Target>();
    for (int64_t c = 0; c < labels_; ++c)
      for (int64_t p = 0; p < count(); ++p)
        y_[c * count() + p] = static_cast<Value<Target>>(targets[sample_[p] * labels_ + c]);
  }

  bool order(int64_t self, Order& order) const override {
    const int64_t n = count();
    Gap* gap = Order::at_least<Gap>(order.gaps, n);
    std::fill_n(gap, n, Gap(0));
    for (int64_t c = 0; c < labels_; ++c) add_gaps<Target>(y_.data() + c * n, self, n, gap);
    if constexpr (!std::is_same_v<Target, int64_t>)
      if (!round_gaps<Target>(gap, n)) return false;
    Entry* entry = Order::at_least<Entry>(order.entries, n);
    Entry* end = entry;
    for (int64_t j = 0; j < n; ++j)
      if (j != self) *end++ = {gap[j], static_cast<int32_t>(j)};
    std::sort(entry, end,
              [](const Entry& a, const Entry& b) { return a.gap > b.gap || (a.gap == b.gap && a.place < b.place); });
    for (int64_t r = 0; r < n - 1; ++r) {
      order.place[r] = entry[r].place;
      order.ends[r] = r == n - 2 || entry[r + 1].gap != entry[r].gap;
    }
    return true;
  }

 private:
  struct Entry {
    Gap gap;
    int32_t place;
  };
  int64_t labels_;
  std::vector<Value<Target>> y_;  // [k, n]
};

// The largest sum of gaps that integer targets [N, k] can have.
inline Wide largest_gap(const Problem& problem) {
  const int64_t* targets = problem.targets.const_data_ptr<int64_t>();
  Wide sum = 0;
  for (int64_t c = 0; c < problem.labels && problem.samples > 0; ++c) {
    int64_t least = targets[c], most = targets[c];
    for (int64_t i = 1; i < problem.samples; ++i) {
      least = std::min(least, targets[i * problem.labels + c]);
      most = std::max(most, targets[i * problem.labels + c]);
    }
    sum += integer_gap(least, most);
  }
  return sum;
}

inline std::unique_ptr<Labels> labels_of(const char* op, const Problem& problem) {
  if (problem.targets.scalar_type() == ScalarType::Long) {
    if (problem.labels == 1) return std::make_unique<Line<int64_t>>(problem);
    if (largest_gap(problem) > UINT64_MAX) return std::make_unique<Space<int64_t, Wide>>(problem);
    return std::make_unique<Space<int64_t>>(problem);
  }
  return dispatch_floating(problem.targets.scalar_type(), op, [&](auto tag) -> std::unique_ptr<Labels> {
    using Target = typename decltype(tag)::type;
    if (problem.labels == 1) return std::make_unique<Line<Target>>(problem);
    return std::make_unique<Space<Target>>(problem);
  });
}

}  // namespace msacore::rank_n_contrast::cpu
