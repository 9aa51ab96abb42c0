// Scanning and ranking the pool, and the greedy steps among candidates, on the CPU.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "kcenter_distance.h"

namespace msacore::kcenter {

constexpr int64_t kScanBlock = 4096;   // rows whose column sums are added in one go, whatever the thread count
constexpr int64_t kPairGrain = 65536;  // multiply-adds a thread should have at least
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

// Column sums [d], checksum per row, largest magnitude and the first row that is not finite (or `end`).
template <typename T>
MSACORE_SIMD void scan_rows(const T* pool, int64_t begin, int64_t end, int64_t d, const uint32_t* key, double* sums,
                            int64_t* checksum, double* largest, int64_t* bad) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = pool + i * d;
    checksum[i] = static_cast<int64_t>(word_sum(x, key, d));
    double row_largest = 0, zero = 0;
#pragma omp simd reduction(max : row_largest) reduction(+ : zero)
    for (int64_t j = 0; j < d; ++j) {
      const double value = static_cast<double>(x[j]), size = value < 0 ? -value : value;
      sums[j] += value;
      row_largest = size > row_largest ? size : row_largest;
      zero += value * 0;  // NaN as soon as one value is not finite
    }
    if (zero != 0 && *bad == end) *bad = i;
    *largest = std::max(*largest, row_largest);
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
template <typename T>
void greedy(const T* candidates, const double* weight, const double* delta, const int64_t* index, int64_t m, int64_t d,
            Ranked bound, int64_t limit, int64_t metric, int64_t* picks, double* scores) {
  std::fill(picks, picks + limit, -1);
  std::fill(scores, scores + limit, kLowest);
  struct Candidate {
    int64_t position;
    double delta, score;
  };
  std::vector<Candidate> alive;
  for (int64_t i = 0; i < m; ++i) alive.push_back({i, delta[i], weight[i] * delta[i]});
  const auto outside_first = [&](const Candidate& c) { return !precedes({c.score, index[c.position]}, bound); };
  std::vector<double> center(d), distance(m);
  const int64_t zero = 0;
  for (int64_t made = 0; made < limit; ++made) {
    // Scores only fall, so a candidate behind the bound is out of the round for good.
    alive.erase(std::remove_if(alive.begin(), alive.end(), outside_first), alive.end());
    if (alive.empty()) return;
    const auto best = std::min_element(alive.begin(), alive.end(), [&](const Candidate& a, const Candidate& b) {
      return precedes({a.score, index[a.position]}, {b.score, index[b.position]});
    });
    picks[made] = best->position;
    scores[made] = best->score;
    const T* picked = candidates + best->position * d;
    for (int64_t j = 0; j < d; ++j) center[j] = static_cast<double>(picked[j]);
    alive.erase(best);
    const int64_t grain = std::max<int64_t>(1, kPairGrain / std::max<int64_t>(1, d));
    torch::stable::parallel_for(0, static_cast<int64_t>(alive.size()), grain, [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        Candidate& c = alive[i];
        exact_distances(candidates + c.position * d, center.data(), &zero, 1, d, metric, &distance[i]);
        c.delta = std::min(c.delta, distance[i]);
        c.score = weight[c.position] * c.delta;
      }
    });
  }
}

}  // namespace msacore::kcenter
