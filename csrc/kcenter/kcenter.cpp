// The steps of greedy centre selection on the CPU. Every decision rests on float64 distances of one formula.
#include "kcenter/kcenter.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/parallel.h"
#include "kcenter/kcenter_fold.h"
#include "kcenter/kcenter_steps.h"

namespace msacore::kcenter::cpu {
namespace {

void check_rows(const char* op, const char* name, const int64_t* rows, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    check(rows[i] >= 0 && rows[i] < limit, op, "expected `", name, "` in [0, ", limit, "), got ", rows[i],
          " at position ", i);
}

// The shift of the filter, scaled and rounded to float32.
std::vector<double> scaled(const Tensor& shift, double scale) {
  const double* from = shift.const_data_ptr<double>();
  std::vector<double> to(from, from + shift.size(0));
  for (double& value : to) value = static_cast<float>(value * scale);
  return to;
}

struct Cpu {
  static void fold(const char* op, const Comparison& in, const Known& known, const Sizes& s, Tensor& delta_out,
                   Tensor& owner_out) {
    check_rows(op, "rows", in.rows.const_data_ptr<int64_t>(), s.rows, s.samples);
    check_rows(op, "start", known.start.const_data_ptr<int64_t>(), s.rows, s.centers + 1);
    const std::vector<double> shift = scaled(in.shift, in.scale);
    dispatch_floating(in.pool.scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      cpu::fold(in.pool.const_data_ptr<T>(), in.rows.const_data_ptr<int64_t>(), known.start.const_data_ptr<int64_t>(),
                in.centers.const_data_ptr<double>(), shift.data(), known.delta.const_data_ptr<double>(),
                known.owner.const_data_ptr<int64_t>(), s, Filter{in.metric, s.width, in.scale},
                delta_out.mutable_data_ptr<double>(), owner_out.mutable_data_ptr<int64_t>());
    });
  }

  static void count(const char* op, const Comparison& in, double radius, const Sizes& s, Tensor& out) {
    check_rows(op, "rows", in.rows.const_data_ptr<int64_t>(), s.rows, s.samples);
    const std::vector<double> shift = scaled(in.shift, in.scale);
    dispatch_floating(in.pool.scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      cpu::count(in.pool.const_data_ptr<T>(), in.rows.const_data_ptr<int64_t>(), in.centers.const_data_ptr<double>(),
                 shift.data(), radius, s, Filter{in.metric, s.width, in.scale}, out.mutable_data_ptr<int64_t>());
    });
  }

  static void products(const char* op, const Comparison& in, const Sizes& s, Tensor& out) {
    const int64_t* rows = in.rows.const_data_ptr<int64_t>();
    check_rows(op, "rows", rows, s.rows, s.samples);
    dispatch_floating(in.pool.scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T* pool = in.pool.const_data_ptr<T>();
      const double *shift = in.shift.const_data_ptr<double>(), *centers = in.centers.const_data_ptr<double>();
      double* to = out.mutable_data_ptr<double>();
      parallel_for(0, s.rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          cpu::products(pool + rows[i] * s.width, shift, centers, s.centers, s.width, to + i * s.centers);
      });
    });
  }

  static void scan(const char* op, const Tensor& pool, Scan& out) {
    dispatch_floating(pool.scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      cpu::scan(pool.const_data_ptr<T>(), pool.size(0), pool.size(1), out.sums.mutable_data_ptr<double>(),
                out.checksum.mutable_data_ptr<int64_t>(), out.largest.mutable_data_ptr<double>(),
                out.bad.mutable_data_ptr<int64_t>());
    });
  }

  static void rank(const Tensor& score, Tensor& out) {
    cpu::rank(score.const_data_ptr<double>(), score.size(0), out.size(0), out.mutable_data_ptr<int64_t>());
  }

  static void greedy(const char* op, const Candidates& in, Tensor& picks, Tensor& scores) {
    const int64_t* group = in.group.size(0) > 0 ? in.group.const_data_ptr<int64_t>() : nullptr;
    const int64_t *room = in.room.const_data_ptr<int64_t>(), groups = in.room.size(0), m = in.rows.size(0);
    if (group) check_rows(op, "group", group, m, groups);
    dispatch_floating(in.rows.scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      cpu::greedy(in.rows.const_data_ptr<T>(), in.weight.const_data_ptr<double>(), in.delta.const_data_ptr<double>(),
                  in.index.const_data_ptr<int64_t>(), group, std::vector<int64_t>(room, room + groups), m,
                  in.rows.size(1), {*in.bound.const_data_ptr<double>(), *in.bound_index.const_data_ptr<int64_t>()},
                  in.limit, in.metric, picks.mutable_data_ptr<int64_t>(), scores.mutable_data_ptr<double>());
    });
  }
};

using Operators = KcenterOperators<Cpu>;

}  // namespace
}  // namespace msacore::kcenter::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def("kcenter_scan(Tensor pool) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("kcenter_rank(Tensor score, *, int count) -> Tensor");
  m.def(
      "kcenter_greedy(Tensor candidates, Tensor weight, Tensor delta, Tensor index, Tensor group, Tensor room, "
      "Tensor bound, Tensor bound_index, *, int limit, int metric) -> (Tensor, Tensor)");
  m.def(
      "kcenter_fold(Tensor pool, Tensor rows, Tensor start, Tensor centers, Tensor shift, Tensor delta, Tensor owner, "
      "*, float scale, int metric) -> (Tensor, Tensor)");
  m.def(
      "kcenter_count(Tensor pool, Tensor rows, Tensor centers, Tensor shift, *, float radius, float scale, int metric) "
      "-> Tensor");
  m.def("kcenter_products(Tensor pool, Tensor rows, Tensor centers, Tensor shift) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  m.impl("kcenter_scan", TORCH_BOX(&msacore::kcenter::cpu::Operators::scan));
  m.impl("kcenter_rank", TORCH_BOX(&msacore::kcenter::cpu::Operators::rank));
  m.impl("kcenter_greedy", TORCH_BOX(&msacore::kcenter::cpu::Operators::greedy));
  m.impl("kcenter_fold", TORCH_BOX(&msacore::kcenter::cpu::Operators::fold));
  m.impl("kcenter_count", TORCH_BOX(&msacore::kcenter::cpu::Operators::count));
  m.impl("kcenter_products", TORCH_BOX(&msacore::kcenter::cpu::Operators::products));
}
