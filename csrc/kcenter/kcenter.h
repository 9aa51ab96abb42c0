// Greedy centre selection: what the operators accept, on every device.
#pragma once
#include "core/check.h"

namespace msacore::kcenter {

enum Metric : int64_t { kEuclidean = 0, kCosine = 1 };

struct Sizes {
  int64_t samples, width, rows, centers;
};

inline void check_metric(const char* op, int64_t metric) {
  check(metric == kEuclidean || metric == kCosine, op, "expected `metric` to be 0 (euclidean) or 1 (cosine), got ",
        metric);
}

inline void check_argument(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                           const char* meaning, ScalarType dtype, const Tensor& pool) {
  check_shape(t, op, name, shape, meaning);
  check_dtype(t, op, name, dtype);
  check_device(t, op, name, pool);
}

// What every operator that compares rows of the pool with centres takes.
inline Sizes check_pool(const char* op, const Tensor& pool, const Tensor& rows, const Tensor& centers,
                        const Tensor& shift, int64_t metric) {
  check_floating(pool, op, "pool");
  check_shape(pool, op, "pool", {-1, -1}, "[N, d]");
  check_argument(op, "rows", rows, {-1}, "[A]", ScalarType::Long, pool);
  check_argument(op, "centers", centers, {-1, pool.size(1)}, "[n, d]", ScalarType::Double, pool);
  check_argument(op, "shift", shift, {pool.size(1)}, "[d]", ScalarType::Double, pool);
  check_metric(op, metric);
  return {pool.size(0), pool.size(1), rows.size(0), centers.size(0)};
}

inline void check_rank(const char* op, const Tensor& score, int64_t count) {
  check_shape(score, op, "score", {-1}, "[N]");
  check_dtype(score, op, "score", ScalarType::Double);
  check(count >= 0, op, "expected `count` to be at least 0, got ", count);
}

inline void check_greedy(const char* op, const Tensor& candidates, const Tensor& weight, const Tensor& delta,
                         const Tensor& index, const Tensor& bound, const Tensor& bound_index, int64_t limit,
                         int64_t metric) {
  check_floating(candidates, op, "candidates");
  check_shape(candidates, op, "candidates", {-1, -1}, "[m, d]");
  const int64_t m = candidates.size(0);
  check_argument(op, "weight", weight, {m}, "[m]", ScalarType::Double, candidates);
  check_argument(op, "delta", delta, {m}, "[m]", ScalarType::Double, candidates);
  check_argument(op, "index", index, {m}, "[m]", ScalarType::Long, candidates);
  check_argument(op, "bound", bound, {1}, "[1]", ScalarType::Double, candidates);
  check_argument(op, "bound_index", bound_index, {1}, "[1]", ScalarType::Long, candidates);
  check(limit >= 0, op, "expected `limit` to be at least 0, got ", limit);
  check_metric(op, metric);
}

}  // namespace msacore::kcenter
