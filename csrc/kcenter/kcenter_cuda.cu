// The steps of greedy centre selection on CUDA: scratch memory and launches.
#include <algorithm>

#include "cuda/registration.cuh"
#include "cuda/sort.cuh"
#include "kcenter/kcenter.h"
#include "kcenter/kcenter_kernels.cuh"
#include "kcenter/kcenter_steps_kernels.cuh"

namespace msacore::kcenter::cuda {
using namespace msacore::cuda;
namespace {

#ifndef MSACORE_SMALL_SIZES
constexpr int64_t kChunkRows = 131072;  // rows packed at a time, which limits their scratch memory
#else
constexpr int64_t kChunkRows = 1024;  // few, so that small pools already take several
#endif
constexpr int64_t kMatrixLimit = 16384;  // up to this many candidates, all distances are computed before the picks

int64_t tiles(int64_t n) { return ceil_div<int64_t>(n, kTile); }

// Rows or centres in the filter's form, and the scratch memory they live in.
struct PackedTensor {
  Tensor rows, ball;
  Packed view;

  PackedTensor(const Tensor& like, int64_t count, int64_t width)
      : rows(empty_tensor(like, {count, padded(width)}, ScalarType::Half)),
        ball(empty_tensor(like, {tiles(count) * kTile, 2}, ScalarType::Float)),
        view{rows.mutable_data_ptr<Half>(), reinterpret_cast<Ball*>(ball.mutable_data_ptr<float>()), count,
             padded(width)} {}
  static int64_t padded(int64_t width) { return round_up<int64_t>(width, kPer16<Half>); }
};

template <bool kCosine, typename In>
void pack(const Source<In>& from, const double* shift, double scale, const Packed& out, cudaStream_t stream) {
  launch(pack_kernel<kCosine, In>, grid_for(out.count * kWarp, kThreads), dim3(kThreads), 0, stream, from, shift, scale,
         out);
}

// Packs the centres, then the rows chunk by chunk, and calls compare(comparison, first row) for each chunk.
template <bool kCosine, typename T, typename Compare>
void for_each_chunk(const kcenter::Comparison& in, const Sizes& s, cudaStream_t stream, const Compare& compare) {
  const int64_t* const rows = in.rows.const_data_ptr<int64_t>();
  const double *const centers = in.centers.const_data_ptr<double>(), *const shift = in.shift.const_data_ptr<double>();
  const PackedTensor packed_centers(in.pool, s.centers, s.width);
  const PackedTensor packed_rows(in.pool, std::min(s.rows, kChunkRows), s.width);
  pack<kCosine>(Source<double>{centers, nullptr, s.centers, s.width}, shift, in.scale, packed_centers.view, stream);
  for (int64_t begin = 0; begin < s.rows; begin += kChunkRows) {
    Packed chunk = packed_rows.view;
    chunk.count = std::min(s.rows - begin, kChunkRows);
    const Source<T> from{in.pool.const_data_ptr<T>(), rows + begin, s.samples, s.width};
    pack<kCosine>(from, shift, in.scale, chunk, stream);
    compare(Comparison<T>{from, centers, chunk, packed_centers.view, Filter(in.scale, s.width)}, begin);
  }
}

dim3 blocks_for(const Packed& rows) { return dim3(std::min(tiles(rows.count), kMaxBlocks)); }

// Calls body(tag of the dtype, whether cosine) with both known at compile time.
template <typename Body>
void dispatch(ScalarType type, const char* op, int64_t metric, Body&& body) {
  dispatch_floating(type, op,
                    [&](auto tag) { metric == kCosine ? body(tag, std::true_type{}) : body(tag, std::false_type{}); });
}

struct Cuda {
  static void fold(const char* op, const kcenter::Comparison& in, const Known& known, const Sizes& s, Tensor& delta_out,
                   Tensor& owner_out) {
    if (s.samples == 0 || s.centers == 0) {
      torch::stable::copy_(delta_out, known.delta);
      torch::stable::copy_(owner_out, known.owner);
      return;
    }
    const OnDeviceOf device(in.pool);
    dispatch(in.pool.scalar_type(), op, in.metric, [&](auto tag, auto cosine) {
      using T = typename decltype(tag)::type;
      constexpr bool kCosine = decltype(cosine)::value;
      for_each_chunk<kCosine, T>(in, s, device.stream, [&](const Comparison<T>& comparison, int64_t begin) {
        launch(fold_kernel<kCosine, T>, blocks_for(comparison.x), dim3(kTileThreads), kProductBytes, device.stream,
               comparison, known.start.const_data_ptr<int64_t>() + begin, known.delta.const_data_ptr<double>() + begin,
               known.owner.const_data_ptr<int64_t>() + begin, delta_out.mutable_data_ptr<double>() + begin,
               owner_out.mutable_data_ptr<int64_t>() + begin);
      });
    });
  }

  static void count(const char* op, const kcenter::Comparison& in, double radius, const Sizes& s, Tensor& out) {
    if (s.samples == 0) {
      torch::stable::copy_(out, torch::stable::new_zeros(out, {s.rows}));
      return;
    }
    const OnDeviceOf device(in.pool);
    dispatch(in.pool.scalar_type(), op, in.metric, [&](auto tag, auto cosine) {
      using T = typename decltype(tag)::type;
      constexpr bool kCosine = decltype(cosine)::value;
      for_each_chunk<kCosine, T>(in, s, device.stream, [&](const Comparison<T>& comparison, int64_t begin) {
        launch(count_kernel<kCosine, T>, blocks_for(comparison.x), dim3(kTileThreads), kProductBytes, device.stream,
               comparison, radius, out.mutable_data_ptr<int64_t>() + begin);
      });
    });
  }

  static void products(const char* op, const kcenter::Comparison& in, const Sizes& s, Tensor& out) {
    if (s.samples == 0 || s.rows * s.centers == 0) return;
    const OnDeviceOf device(in.pool);
    dispatch_floating(in.pool.scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch(products_kernel<T>, grid_for(s.rows * s.centers * kGroup, kThreads), dim3(kThreads), 0, device.stream,
             in.pool.const_data_ptr<T>(), in.rows.const_data_ptr<int64_t>(), in.shift.const_data_ptr<double>(),
             in.centers.const_data_ptr<double>(), s.samples, s.rows, s.centers, s.width,
             out.mutable_data_ptr<double>());
    });
  }

  static void scan(const char* op, const Tensor& pool, Scan& out) {
    const OnDeviceOf device(pool);
    const int64_t n = pool.size(0), d = pool.size(1);
    Tensor largest_bits = empty_tensor(pool, {1}, ScalarType::Long);
    auto* const most = reinterpret_cast<unsigned long long*>(largest_bits.mutable_data_ptr<int64_t>());
    auto* const worst = reinterpret_cast<unsigned long long*>(out.bad.mutable_data_ptr<int64_t>());
    const auto frame = [&](double* largest) {
      launch(scan_frame_kernel, dim3(1), dim3(1), 0, device.stream, n, most, worst, largest);
    };
    frame(nullptr);
    dispatch_floating(pool.scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch(scan_rows_kernel<T>, grid_for(n * kWarp, kThreads), dim3(kThreads), 0, device.stream,
             pool.const_data_ptr<T>(), n, d, out.checksum.mutable_data_ptr<int64_t>(), most, worst);
      launch(column_sums_kernel<T>, dim3(out.sums.size(0)), dim3(kThreads), 0, device.stream, pool.const_data_ptr<T>(),
             n, d, out.sums.mutable_data_ptr<double>());
    });
    frame(out.largest.mutable_data_ptr<double>());
  }

  static void rank(const Tensor& score, Tensor& out) {
    const OnDeviceOf device(score);
    const int64_t n = score.size(0);
    constexpr int64_t kHalf = int64_t{1} << 32;
    Tensor low = empty_tensor(score, {n}, ScalarType::Long), high = empty_tensor(score, {n}, ScalarType::Long);
    launch(rank_keys_kernel, grid_for(n, kThreads), dim3(kThreads), 0, device.stream, score.const_data_ptr<double>(), n,
           low.mutable_data_ptr<int64_t>(), high.mutable_data_ptr<int64_t>());
    const Tensor by_low = sorted_positions(low, kHalf, device.stream);
    Tensor order = sorted_positions(high, kHalf, device.stream, &by_low);
    torch::stable::copy_(out, torch::stable::narrow(order, 0, 0, out.size(0)));
  }

  static void greedy(const char* op, const Candidates& in, Tensor& picks, Tensor& scores) {
    const OnDeviceOf device(in.rows);
    const int64_t m = in.rows.size(0), d = in.rows.size(1), groups = in.group.size(0) > 0 ? in.room.size(0) : 0;
    const bool all = m <= kMatrixLimit;
    Tensor norms = empty_tensor(in.delta, {in.metric == kCosine ? m : 0}),
           distances = empty_tensor(in.delta, {all ? m : 0, m}), now = empty_tensor(in.delta, {m}),
           left = empty_tensor(in.index, {groups});
    dispatch(in.rows.scalar_type(), op, in.metric, [&](auto tag, auto cosine) {
      using T = typename decltype(tag)::type;
      constexpr bool kCosine = decltype(cosine)::value;
      const T* x = in.rows.const_data_ptr<T>();
      double* const norm = norms.mutable_data_ptr<double>();
      double* const matrix = all ? distances.mutable_data_ptr<double>() : nullptr;
      if (kCosine) {
        launch(norms_kernel<T>, grid_for(m * kGroup, kThreads), dim3(kThreads), 0, device.stream, x, m, d, norm);
      }
      if (all) {
        const dim3 grid(ceil_div<int64_t>(m, kMatrixColumns), ceil_div<int64_t>(m, kMatrixRows));
        launch(distances_kernel<kCosine, T>, grid, dim3(kThreads), 0, device.stream, x, norm, m, d, matrix);
      }
      const Contest<T> among{x,
                             norm,
                             matrix,
                             in.weight.const_data_ptr<double>(),
                             in.index.const_data_ptr<int64_t>(),
                             groups > 0 ? in.group.const_data_ptr<int64_t>() : nullptr,
                             m,
                             d};
      launch(greedy_kernel<kCosine, T>, dim3(1), dim3(kGreedyThreads), 0, device.stream, among,
             in.delta.const_data_ptr<double>(), in.room.const_data_ptr<int64_t>(), groups,
             in.bound.const_data_ptr<double>(), in.bound_index.const_data_ptr<int64_t>(), in.limit,
             now.mutable_data_ptr<double>(), left.mutable_data_ptr<int64_t>(), picks.mutable_data_ptr<int64_t>(),
             scores.mutable_data_ptr<double>());
    });
  }
};

using Operators = KcenterOperators<Cuda>;

}  // namespace
}  // namespace msacore::kcenter::cuda

MSACORE_CUDA_LIBRARY(m) {
  m.impl("kcenter_scan", TORCH_BOX(&msacore::kcenter::cuda::Operators::scan));
  m.impl("kcenter_rank", TORCH_BOX(&msacore::kcenter::cuda::Operators::rank));
  m.impl("kcenter_greedy", TORCH_BOX(&msacore::kcenter::cuda::Operators::greedy));
  m.impl("kcenter_fold", TORCH_BOX(&msacore::kcenter::cuda::Operators::fold));
  m.impl("kcenter_count", TORCH_BOX(&msacore::kcenter::cuda::Operators::count));
  m.impl("kcenter_products", TORCH_BOX(&msacore::kcenter::cuda::Operators::products));
}
