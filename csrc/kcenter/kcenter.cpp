// The steps of greedy centre selection on the CPU. Every decision falls on float64 distances of one formula.
#include "kcenter/kcenter.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "kcenter/kcenter_fold.h"
#include "kcenter/kcenter_steps.h"

namespace msacore::kcenter::cpu {
namespace {

void check_rows(const char* op, const char* name, const int64_t* rows, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    check(rows[i] >= 0 && rows[i] < limit, op, "expected `", name, "` in [0, ", limit, "), got ", rows[i],
          " at position ", i);
}

// The shift of the filter, a float32 number.
std::vector<double> scaled(const Tensor& shift, double scale) {
  const double* from = shift.const_data_ptr<double>();
  std::vector<double> to(from, from + shift.size(0));
  for (double& value : to) value = static_cast<float>(value * scale);
  return to;
}

std::tuple<Tensor, Tensor> fold_cpu(const Tensor& pool_, const Tensor& rows_, const Tensor& start_,
                                    const Tensor& centers_, const Tensor& shift_, const Tensor& delta_,
                                    const Tensor& owner_, double scale, int64_t metric) {
  constexpr const char* op = "kcenter_fold";
  const Sizes s = check_pool(op, pool_, rows_, centers_, shift_, metric);
  check_argument(op, "start", start_, {s.rows}, "[A]", ScalarType::Long, pool_);
  check_argument(op, "delta", delta_, {s.rows}, "[A]", ScalarType::Double, pool_);
  check_argument(op, "owner", owner_, {s.rows}, "[A]", ScalarType::Long, pool_);
  const Tensor pool = torch::stable::contiguous(pool_), rows = torch::stable::contiguous(rows_),
               start = torch::stable::contiguous(start_), centers = torch::stable::contiguous(centers_),
               delta = torch::stable::contiguous(delta_), owner = torch::stable::contiguous(owner_);
  check_rows(op, "rows", rows.const_data_ptr<int64_t>(), s.rows, s.samples);
  check_rows(op, "start", start.const_data_ptr<int64_t>(), s.rows, s.centers + 1);
  const Filter f{metric, s.width, scale};
  const std::vector<double> shift = scaled(torch::stable::contiguous(shift_), scale);
  Tensor delta_out = torch::stable::new_empty(delta, {s.rows}), owner_out = torch::stable::new_empty(owner, {s.rows});
  dispatch_floating(pool.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    fold(pool.const_data_ptr<T>(), rows.const_data_ptr<int64_t>(), start.const_data_ptr<int64_t>(),
         centers.const_data_ptr<double>(), shift.data(), delta.const_data_ptr<double>(),
         owner.const_data_ptr<int64_t>(), s, f, delta_out.mutable_data_ptr<double>(),
         owner_out.mutable_data_ptr<int64_t>());
  });
  return {delta_out, owner_out};
}

Tensor count_cpu(const Tensor& pool_, const Tensor& rows_, const Tensor& centers_, const Tensor& shift_, double radius,
                 double scale, int64_t metric) {
  constexpr const char* op = "kcenter_count";
  const Sizes s = check_pool(op, pool_, rows_, centers_, shift_, metric);
  const Tensor pool = torch::stable::contiguous(pool_), rows = torch::stable::contiguous(rows_),
               centers = torch::stable::contiguous(centers_);
  check_rows(op, "rows", rows.const_data_ptr<int64_t>(), s.rows, s.samples);
  const std::vector<double> shift = scaled(torch::stable::contiguous(shift_), scale);
  Tensor out = torch::stable::new_empty(rows, {s.rows});
  dispatch_floating(pool.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    count(pool.const_data_ptr<T>(), rows.const_data_ptr<int64_t>(), centers.const_data_ptr<double>(), shift.data(),
          radius, s, Filter{metric, s.width, scale}, out.mutable_data_ptr<int64_t>());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scan_cpu(const Tensor& pool_) {
  constexpr const char* op = "kcenter_scan";
  check_floating(pool_, op, "pool");
  check_shape(pool_, op, "pool", {-1, -1}, "[N, d]");
  const Tensor pool = torch::stable::contiguous(pool_);
  const int64_t n = pool.size(0), d = pool.size(1);
  Tensor sums = torch::stable::new_empty(pool, {d}, ScalarType::Double),
         checksum = torch::stable::new_empty(pool, {n}, ScalarType::Long),
         largest = torch::stable::new_empty(pool, {1}, ScalarType::Double),
         bad = torch::stable::new_empty(pool, {1}, ScalarType::Long);
  dispatch_floating(pool.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    scan(pool.const_data_ptr<T>(), n, d, sums.mutable_data_ptr<double>(), checksum.mutable_data_ptr<int64_t>(),
         largest.mutable_data_ptr<double>(), bad.mutable_data_ptr<int64_t>());
  });
  return {sums, checksum, largest, bad};
}

Tensor rank_cpu(const Tensor& score_, int64_t count) {
  check_rank("kcenter_rank", score_, count);
  const Tensor score = torch::stable::contiguous(score_);
  const int64_t n = score.size(0);
  Tensor out = torch::stable::new_empty(score, {std::min(count, n)}, ScalarType::Long);
  rank(score.const_data_ptr<double>(), n, std::min(count, n), out.mutable_data_ptr<int64_t>());
  return out;
}

std::tuple<Tensor, Tensor> greedy_cpu(const Tensor& candidates_, const Tensor& weight_, const Tensor& delta_,
                                      const Tensor& index_, const Tensor& bound_, const Tensor& bound_index_,
                                      int64_t limit, int64_t metric) {
  constexpr const char* op = "kcenter_greedy";
  check_greedy(op, candidates_, weight_, delta_, index_, bound_, bound_index_, limit, metric);
  const Tensor candidates = torch::stable::contiguous(candidates_), weight = torch::stable::contiguous(weight_),
               delta = torch::stable::contiguous(delta_), index = torch::stable::contiguous(index_);
  Tensor picks = torch::stable::new_empty(index, {limit}), scores = torch::stable::new_empty(delta, {limit});
  dispatch_floating(candidates.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    greedy(candidates.const_data_ptr<T>(), weight.const_data_ptr<double>(), delta.const_data_ptr<double>(),
           index.const_data_ptr<int64_t>(), candidates.size(0), candidates.size(1),
           {*bound_.const_data_ptr<double>(), *bound_index_.const_data_ptr<int64_t>()}, limit, metric,
           picks.mutable_data_ptr<int64_t>(), scores.mutable_data_ptr<double>());
  });
  return {picks, scores};
}

}  // namespace
}  // namespace msacore::kcenter::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def("kcenter_scan(Tensor pool) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("kcenter_rank(Tensor score, *, int count) -> Tensor");
  m.def(
      "kcenter_greedy(Tensor candidates, Tensor weight, Tensor delta, Tensor index, Tensor bound, Tensor bound_index, "
      "*, int limit, int metric) -> (Tensor, Tensor)");
  m.def(
      "kcenter_fold(Tensor pool, Tensor rows, Tensor start, Tensor centers, Tensor shift, Tensor delta, Tensor owner, "
      "*, float scale, int metric) -> (Tensor, Tensor)");
  m.def(
      "kcenter_count(Tensor pool, Tensor rows, Tensor centers, Tensor shift, *, float radius, float scale, int metric) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  m.impl("kcenter_scan", TORCH_BOX(&msacore::kcenter::cpu::scan_cpu));
  m.impl("kcenter_rank", TORCH_BOX(&msacore::kcenter::cpu::rank_cpu));
  m.impl("kcenter_greedy", TORCH_BOX(&msacore::kcenter::cpu::greedy_cpu));
  m.impl("kcenter_fold", TORCH_BOX(&msacore::kcenter::cpu::fold_cpu));
  m.impl("kcenter_count", TORCH_BOX(&msacore::kcenter::cpu::count_cpu));
}
