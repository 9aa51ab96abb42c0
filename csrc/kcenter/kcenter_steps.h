// Scanning and ranking the pool, and the greedy steps among candidates, on the CPU.
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/round.h"
#include "cpu/parallel.h"
#include "kcenter/kcenter_buckets.h"
#include "kcenter/kcenter_distance.h"

namespace msacore::kcenter::cpu {

// Checksum of a row: the sum of its 32-bit words (16-bit words for 16-bit types), each times its key
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

// Without their sign, the bits of floating-point numbers are ordered by magnitude, with infinity and NaN above all
// others.
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

constexpr int64_t kTogether = 4;  // rows added before they go into the tree
constexpr int64_t kLevels = 11;   // of the tree above them: 4 · 2^10 rows are a block

// Adds the rows of one block along a binary tree over row numbers: sums [d]. `level` [kLevels, d]: sums of finished
// subtrees, each waiting for the one to its right. Also computes the checksum of each row, the largest magnitude, and
// the first row that is not finite (`bad` stays if there is none).
template <typename T>
MSACORE_SIMD void scan_block(const T* pool, int64_t rows, int64_t d, const uint32_t* key, double* level, double* sums,
                             int64_t* checksum, double* largest, int64_t* bad) {
  int64_t group = 0;
  for (int64_t i = 0; i < rows; i += kTogether, ++group) {
    const T* x = pool + i * d;
    const int64_t here = std::min(kTogether, rows - i);
    for (int64_t r = 0; r < here; ++r) {
      checksum[i + r] = static_cast<int64_t>(word_sum(x + r * d, key, d));
      const double row_largest = largest_magnitude(x + r * d, d);
      if (!(row_largest <= std::numeric_limits<double>::max()) && *bad == rows) *bad = i + r;
      *largest = std::max(*largest, row_largest);
    }
    int64_t finished = 0;
    while (group >> finished & 1) ++finished;
    double* __restrict__ sum = level + finished * d;
    if (here == kTogether) {
#pragma omp simd
      for (int64_t j = 0; j < d; ++j)
        sum[j] = (static_cast<double>(x[j]) + static_cast<double>(x[d + j])) +
                 (static_cast<double>(x[2 * d + j]) + static_cast<double>(x[3 * d + j]));
    } else {
      for (int64_t j = 0; j < d; ++j) {
        sum[j] = static_cast<double>(x[j]);
        for (int64_t r = 1; r < here; ++r) sum[j] += static_cast<double>(x[r * d + j]);
      }
    }
    for (int64_t l = 0; l < finished; ++l) {
      const double* __restrict__ left = level + l * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) sum[j] = left[j] + sum[j];
    }
  }
  bool empty = true;
  std::fill(sums, sums + d, 0.0);
  for (int64_t l = 0; l < kLevels; ++l) {
    if (!(group >> l & 1)) continue;
    for (int64_t j = 0; j < d; ++j) sums[j] = empty ? level[l * d + j] : level[l * d + j] + sums[j];
    empty = false;
  }
}

template <typename T>
void scan(const T* pool, int64_t n, int64_t d, double* sums, int64_t* checksum, double* largest, int64_t* bad) {
  std::vector<uint32_t> key(2 * d);
  for (int64_t j = 0; j < 2 * d; ++j) key[j] = static_cast<uint32_t>(mix(j + 1)) | 1;
  const int64_t blocks = ceil_div(n, kScanBlock);
  std::vector<double> block_largest(blocks);
  std::vector<int64_t> block_bad(blocks);
  parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<double> level(kLevels * d);
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * kScanBlock, rows = std::min(kScanBlock, n - begin);
      block_bad[b] = rows;
      scan_block(pool + begin * d, rows, d, key.data(), level.data(), sums + b * d, checksum + begin, &block_largest[b],
                 &block_bad[b]);
      block_bad[b] = block_bad[b] == rows ? n : begin + block_bad[b];
    }
  });
  *largest = 0;
  *bad = n;
  for (int64_t b = 0; b < blocks; ++b) {
    *largest = std::max(*largest, block_largest[b]);
    *bad = std::min(*bad, block_bad[b]);
  }
}

// out [count] = the first `count` of all indices in the order of `precedes`
inline void rank(const double* score, int64_t n, int64_t count, int64_t* out) {
  if (count == 0) return;
  const auto at = [&](int64_t i) { return score[i] == score[i] ? score[i] : kLowest; };
  // A sample yields a score that about 2 · `count` scores exceed. It only saves work, and is dropped when fewer than
  // `count` scores reach it.
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

// Plain greedy selection among candidates, for as long as the best of them precedes `bound`, which precedes or equals
// everything outside. picks, scores [limit]: positions and scores of the picks, then -1 and -inf. group [m] or null:
// the group of each candidate; room [groups]: the picks that each group may still get. Scores only fall, so an earlier
// score is an upper bound: a candidate takes in the picks it lacks only while it still leads the others.
template <typename T>
void greedy(const T* candidates, const double* weight, const double* delta, const int64_t* index, const int64_t* group,
            std::vector<int64_t> room, int64_t m, int64_t d, Ranked bound, int64_t limit, int64_t metric,
            int64_t* picks, double* scores) {
  std::fill(picks, picks + limit, -1);
  std::fill(scores, scores + limit, kLowest);
  if (metric == kEuclidean && d > 0 && d <= kFewDimensions)
    return greedy_in_buckets(candidates, weight, delta, index, group, std::move(room), m, d, bound, limit, picks,
                             scores);
  struct Candidate {
    Ranked ranked;
    double delta;
    int64_t position, taken;  // taken: number of picks that `delta` accounts for
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
    if (group && room[group[best.position]] <= 0) {
      heap.pop_back();
      continue;
    }
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
      if (group) --room[group[best.position]];
      heap.pop_back();
      ++made;
    }
  }
}

}  // namespace msacore::kcenter::cpu
