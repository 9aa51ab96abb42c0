// Greedy centre selection: what the operators accept and allocate, on every device.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "core/allocate.h"
#include "core/check.h"
#include "core/round.h"

namespace msacore::kcenter {

enum Metric : int64_t { kEuclidean = 0, kCosine = 1 };

// Rows whose column sums a scan returns as one sum: a node of the tree over row numbers (msacore/selection/tree.py).
constexpr int64_t kScanBlock = 4096;

struct Sizes {
  int64_t samples, width, rows, centers;
};

// Rows of the pool that are compared with centres. `shift` and `scale` serve the filter that precedes the exact
// distances.
struct Comparison {
  Tensor pool, rows, centers, shift;
  double scale;
  int64_t metric;
};

// What is already known of each row: the number `start` of centres that it was compared with, the distance to the
// nearest of them, and the number of that centre.
struct Known {
  Tensor start, delta, owner;
};

// Candidates that compete for picks. group [m] or [0]: the entry of room [groups] that a pick of the candidate lowers.
struct Candidates {
  Tensor rows, weight, delta, index, group, room, bound, bound_index;
  int64_t limit, metric;
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

inline Sizes check_pool(const char* op, const Tensor& pool, const Tensor& rows, const Tensor& centers,
                        const Tensor& shift) {
  check_floating(pool, op, "pool");
  check_shape(pool, op, "pool", {-1, -1}, "[N, d]");
  check_argument(op, "rows", rows, {-1}, "[A]", ScalarType::Long, pool);
  check_argument(op, "centers", centers, {-1, pool.size(1)}, "[n, d]", ScalarType::Double, pool);
  check_argument(op, "shift", shift, {pool.size(1)}, "[d]", ScalarType::Double, pool);
  return {pool.size(0), pool.size(1), rows.size(0), centers.size(0)};
}

inline void check_rank(const char* op, const Tensor& score, int64_t count) {
  check_shape(score, op, "score", {-1}, "[N]");
  check_dtype(score, op, "score", ScalarType::Double);
  check(count >= 0, op, "expected `count` to be at least 0, got ", count);
}

inline void check_greedy(const char* op, const Candidates& in) {
  check_floating(in.rows, op, "candidates");
  check_shape(in.rows, op, "candidates", {-1, -1}, "[m, d]");
  const int64_t m = in.rows.size(0);
  check_argument(op, "weight", in.weight, {m}, "[m]", ScalarType::Double, in.rows);
  check_argument(op, "delta", in.delta, {m}, "[m]", ScalarType::Double, in.rows);
  check_argument(op, "index", in.index, {m}, "[m]", ScalarType::Long, in.rows);
  check_argument(op, "group", in.group, {in.group.dim() == 1 && in.group.size(0) == 0 ? 0 : m}, "[m] or [0]",
                 ScalarType::Long, in.rows);
  check_argument(op, "room", in.room, {-1}, "[G]", ScalarType::Long, in.rows);
  check_argument(op, "bound", in.bound, {1}, "[1]", ScalarType::Double, in.rows);
  check_argument(op, "bound_index", in.bound_index, {1}, "[1]", ScalarType::Long, in.rows);
  check(in.group.size(0) == 0 || in.room.size(0) > 0, op, "expected `room` to have an entry per group, got none");
  check(in.limit >= 0, op, "expected `limit` to be at least 0, got ", in.limit);
  check_metric(op, in.metric);
}

// Column sums of blocks of rows, a checksum per row, the largest magnitude, and the first row that is not finite (N
// where all are finite).
struct Scan {
  Tensor sums, checksum, largest, bad;
};

// The operators of a device. The functions of `Device` get checked, contiguous arguments and fill the tensors that are
// allocated here.
template <typename Device>
struct KcenterOperators {
  static Tensor contiguous(const Tensor& t) { return torch::stable::contiguous(t); }

  static std::tuple<Tensor, Tensor> fold(const Tensor& pool, const Tensor& rows, const Tensor& start,
                                         const Tensor& centers, const Tensor& shift, const Tensor& delta,
                                         const Tensor& owner, double scale, int64_t metric) {
    constexpr const char* op = "kcenter_fold";
    const Sizes s = check_pool(op, pool, rows, centers, shift);
    check_metric(op, metric);
    check_argument(op, "start", start, {s.rows}, "[A]", ScalarType::Long, pool);
    check_argument(op, "delta", delta, {s.rows}, "[A]", ScalarType::Double, pool);
    check_argument(op, "owner", owner, {s.rows}, "[A]", ScalarType::Long, pool);
    Tensor delta_out = empty_tensor(delta, {s.rows}), owner_out = empty_tensor(owner, {s.rows});
    Device::fold(op, {contiguous(pool), contiguous(rows), contiguous(centers), contiguous(shift), scale, metric},
                 {contiguous(start), contiguous(delta), contiguous(owner)}, s, delta_out, owner_out);
    return {delta_out, owner_out};
  }

  static Tensor count(const Tensor& pool, const Tensor& rows, const Tensor& centers, const Tensor& shift, double radius,
                      double scale, int64_t metric) {
    constexpr const char* op = "kcenter_count";
    const Sizes s = check_pool(op, pool, rows, centers, shift);
    check_metric(op, metric);
    Tensor out = empty_tensor(rows, {s.rows});
    Device::count(op, {contiguous(pool), contiguous(rows), contiguous(centers), contiguous(shift), scale, metric},
                  radius, s, out);
    return out;
  }

  static Tensor products(const Tensor& pool, const Tensor& rows, const Tensor& centers, const Tensor& shift) {
    constexpr const char* op = "kcenter_products";
    const Sizes s = check_pool(op, pool, rows, centers, shift);
    Tensor out = empty_tensor(centers, {s.rows, s.centers});
    Device::products(op, {contiguous(pool), contiguous(rows), contiguous(centers), contiguous(shift), 1, kEuclidean}, s,
                     out);
    return out;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> scan(const Tensor& pool) {
    constexpr const char* op = "kcenter_scan";
    check_floating(pool, op, "pool");
    check_shape(pool, op, "pool", {-1, -1}, "[N, d]");
    const int64_t n = pool.size(0), d = pool.size(1);
    Scan out{empty_tensor(pool, {ceil_div(n, kScanBlock), d}, ScalarType::Double),
             empty_tensor(pool, {n}, ScalarType::Long), empty_tensor(pool, {1}, ScalarType::Double),
             empty_tensor(pool, {1}, ScalarType::Long)};
    Device::scan(op, contiguous(pool), out);
    return {out.sums, out.checksum, out.largest, out.bad};
  }

  static Tensor rank(const Tensor& score, int64_t count) {
    check_rank("kcenter_rank", score, count);
    Tensor out = empty_tensor(score, {std::min(count, score.size(0))}, ScalarType::Long);
    Device::rank(contiguous(score), out);
    return out;
  }

  static std::tuple<Tensor, Tensor> greedy(const Tensor& candidates, const Tensor& weight, const Tensor& delta,
                                           const Tensor& index, const Tensor& group, const Tensor& room,
                                           const Tensor& bound, const Tensor& bound_index, int64_t limit,
                                           int64_t metric) {
    constexpr const char* op = "kcenter_greedy";
    check_greedy(op, {candidates, weight, delta, index, group, room, bound, bound_index, limit, metric});
    Tensor picks = empty_tensor(index, {limit}), scores = empty_tensor(delta, {limit});
    Device::greedy(op,
                   {contiguous(candidates), contiguous(weight), contiguous(delta), contiguous(index), contiguous(group),
                    contiguous(room), bound, bound_index, limit, metric},
                   picks, scores);
    return {picks, scores};
  }
};

}  // namespace msacore::kcenter
