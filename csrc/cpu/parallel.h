// Parallel loops whose parts go to whichever thread is free, so that a thread that shares its core with another process
// takes fewer parts.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "core/round.h"

namespace msacore::cpu {

// Calls body(own, first, last) for the parts of begin … end, where `own` is what a thread gets from `make`, once for
// all its parts. Every part but the last has at least `grain` members. For a given loop, the parts depend on the number
// of threads alone; which thread takes a part is not fixed.
template <typename Make, typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Make& make, const Body& body) {
  constexpr int64_t kPartsOfAThread = 8;
  if (begin >= end) return;
  const int64_t count = end - begin;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(count, grain));
  const int64_t part = threads > 1 ? std::max(grain, ceil_div(count, threads * kPartsOfAThread)) : count;
  std::atomic<int64_t> next{begin};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    int64_t first = next.fetch_add(part, std::memory_order_relaxed);
    if (first >= end) return;
    auto own = make();
    for (; first < end; first = next.fetch_add(part, std::memory_order_relaxed))
      body(own, first, std::min(first + part, end));
  });
}

// The same with body(first, last).
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  struct Nothing {};
  parallel_for(
      begin, end, grain, [] { return Nothing(); },
      [&](const Nothing&, int64_t first, int64_t last) { body(first, last); });
}

}  // namespace msacore::cpu
