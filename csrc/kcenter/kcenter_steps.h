// Scanning and ranking the pool, and the greedy steps among candidates, on the CPU.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "kcenter/kcenter_distance.h"

namespace msacore::kcenter::cpu {

constexpr int64_t kScanBlock = 4096;  // rows whose column sums are added in one go, whatever the thread count
constexpr double kLowest = -std::numeric_limits<double>::infinity();

// 32-bit words of a row, for the checksum
template <typename T>
MSACORE_INLINE uint64_t word_sum(const T* x, const uint32_t* key, int64_t d) {
  uint64_t sum = 0;
  if constexpr (sizeof(T) == 2) {
    for (int64_t j = 0; j < d; ++j) {
      uint16_t bits;
      std::memcpy(&bits, x + j, 2);
      sum += static_cast<uint64_t>(bits) * key[j];
    }
  } else {
    const int64_t words = d * static_cast<int64_t>(sizeof(T) / 4);
    const char* bytes = reinterpret_cast<const char*>(x);
    for (int64_t j = 0; j < words; ++j) {
      uint32_t bits;
      std::memcpy(&bits, bytes + 4 * j, 4);
      sum += static_cast<uint64_t>(bits) * key[j];
    }
  }
  return sum;
}

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

// Without their sign, the bits of floating-point numbers are ordered by magnitude: infinity and NaN above all others.
template <typename T>
MSACORE_INLINE double largest_magnitude(const T* x, int64_t d) {
  using Bits = std::conditional_t<sizeof(T) == 2, int16_t, std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  Bits largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < d; ++j) {
    Bits bits;
    std::memcpy(&bits, x + j, sizeof(T));
    bits = static_cast<Bits>(bits & std::numeric_limits<Bits>::max());
    largest = bits > largest ? bits : largest;
  }
  T value;
  std::memcpy(&value, &largest, sizeof(T));
  return static_cast<double>(value);
}

constexpr int64_t kTogether = 4;  // rows added before the column sums are read and written again

// Column sums [d], checksum per row, largest magnitude and the first row that is not finite (or `end`).
template <typename T>
MSACORE_SIMD void scan_rows(const T* pool, int64_t begin, int64_t end, int64_t d, const uint32_t* key, double* sums,
                            int64_t* checksum, double* largest, int64_t* bad) {
  for (int64_t i = begin; i < end; i += kTogether) {
    const T* x = pool + i * d;
    const int64_t rows = std::min(kTogether, end - i);
    for (int64_t r = 0; r < rows; ++r) {
      checksum[i + r] = static_cast<int64_t>(word_sum(x + r * d, key, d));
      const double row_largest = largest_magnitude(x + r * d, d);
      if (!(row_largest <= std::numeric_limits<double>::max()) && *bad == end) *bad = i + r;
      *largest = std::max(*largest, row_largest);
    }
    if (rows == kTogether) {
#pragma omp simd
      for (int64_t j = 0; j < d; ++j)
        sums[j] += (static_cast<double>(x[j]) + static_cast<double>(x[d + j])) +
                   (static_cast<double>(x[2 * d + j]) + static_cast<double>(x[3 * d + j]));
    } else {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < d; ++j) sums[j] += static_cast<double>(x[r * d + j]);
    }
  }
}

template <typename T>
void scan(const T* pool, int64_t n, int64_t d, double* sums, int64_t* checksum, double* largest, int64_t* bad) {
  std::vector<uint32_t> key(2 * d);
  for (int64_t j = 0; j < 2 * d; ++j) key[j] = static_cast<uint32_t>(mix(j + 1)) | 1;
  const int64_t blocks = (n + kScanBlock - 1) / kScanBlock;
  std::vector<double> block_sums(blocks * d), block_largest(blocks);
  std::vector<int64_t> block_bad(blocks);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t end = std::min(n, (b + 1) * kScanBlock);
      block_bad[b] = end;
      scan_rows(pool, b * kScanBlock, end, d, key.data(), block_sums.data() + b * d, checksum, &block_largest[b],
                &block_bad[b]);
      if (block_bad[b] == end) block_bad[b] = n;
    }
  });
  std::fill(sums, sums + d, 0.0);
  *largest = 0;
  *bad = n;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t j = 0; j < d; ++j) sums[j] += block_sums[b * d + j];
    *largest = std::max(*largest, block_largest[b]);
    *bad = std::min(*bad, block_bad[b]);
  }
}

using Ranked = std::pair<double, int64_t>;  // score, index

// Higher scores first, smaller indices first among equals.
inline bool precedes(const Ranked& a, const Ranked& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

// out [count] = the first `count` of all indices in that order
inline void rank(const double* score, int64_t n, int64_t count, int64_t* out) {
  if (count == 0) return;
  const auto at = [&](int64_t i) { return score[i] == score[i] ? score[i] : kLowest; };
  // A sample tells a score that about twice as many exceed; it only saves work, and is dropped when it misses.
  constexpr int64_t kSample = 4096;
  double floor = kLowest;
  const int64_t stride = n / kSample;
  if (stride >= 4 && count < n / 4) {
    std::vector<double> sample(kSample);
    for (int64_t i = 0; i < kSample; ++i) sample[i] = at(i * stride);
    const int64_t place = std::min(kSample - 1, 2 * count / stride + 8);
    std::nth_element(sample.begin(), sample.begin() + place, sample.end(), std::greater<double>());
    floor = sample[place];
  }
  std::vector<Ranked> found;
  const auto collect = [&] {
    found.clear();
    for (int64_t i = 0; i < n; ++i)
      if (at(i) >= floor) found.emplace_back(at(i), i);
  };
  collect();
  if (static_cast<int64_t>(found.size()) < count) {
    floor = kLowest;
    collect();
  }
  if (count < static_cast<int64_t>(found.size()))
    std::nth_element(found.begin(), found.begin() + count, found.end(), precedes);
  std::sort(found.begin(), found.begin() + count, precedes);
  for (int64_t i = 0; i < count; ++i) out[i] = found[i].second;
}

// Plain greedy among candidates, for as long as the best of them precedes `bound`, which precedes or equals everything
// outside. picks, scores [limit]: positions of the picks, then -1, and their scores.
// Scores only fall, so one from earlier is an upper bound: a candidate takes in the picks it lacks only while it still
// leads the others.
template <typename T>
void greedy(const T* candidates, const double* weight, const double* delta, const int64_t* index, int64_t m, int64_t d,
            Ranked bound, int64_t limit, int64_t metric, int64_t* picks, double* scores) {
  std::fill(picks, picks + limit, -1);
  std::fill(scores, scores + limit, kLowest);
  struct Candidate {
    Ranked ranked;
    double delta;
    int64_t position, taken;  // how many of the picks `delta` knows
  };
  const auto behind = [](const Candidate& a, const Candidate& b) { return precedes(b.ranked, a.ranked); };
  std::vector<Candidate> heap;
  for (int64_t i = 0; i < m; ++i)
    if (const Ranked ranked{weight[i] * delta[i], index[i]}; precedes(ranked, bound))
      heap.push_back({ranked, delta[i], i, 0});
  std::make_heap(heap.begin(), heap.end(), behind);
  std::vector<double> centers;
  for (int64_t made = 0; made < limit && !heap.empty();) {
    std::pop_heap(heap.begin(), heap.end(), behind);
    Candidate& best = heap.back();
    const T* row = candidates + best.position * d;
    const auto leads = [&] {
      return precedes(best.ranked, bound) && (heap.size() == 1 || precedes(best.ranked, heap.front().ranked));
    };
    for (; best.taken < made && leads(); ++best.taken) {
      double distance;
      exact_distances(row, centers.data(), &best.taken, 1, d, metric, &distance);
      best.delta = std::min(best.delta, distance);
      best.ranked.first = weight[best.position] * best.delta;
    }
    if (!precedes(best.ranked, bound)) {
      heap.pop_back();
    } else if (best.taken < made || !leads()) {
      std::push_heap(heap.begin(), heap.end(), behind);
    } else {
      picks[made] = best.position;
      scores[made] = best.ranked.first;
      for (int64_t j = 0; j < d; ++j) centers.push_back(static_cast<double>(row[j]));
      heap.pop_back();
      ++made;
    }
  }
}

}  // namespace msacore::kcenter::cpu
