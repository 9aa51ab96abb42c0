// The steps of greedy centre selection on CUDA: checks, workspace and launches.
#include <algorithm>
#include <tuple>

#include "cuda/registration.cuh"
#include "cuda/sort.cuh"
#include "kcenter/kcenter.h"
#include "kcenter/kcenter_kernels.cuh"
#include "kcenter/kcenter_steps_kernels.cuh"

namespace msacore::kcenter::cuda {
using namespace msacore::cuda;
namespace {

#ifdef __CUDACC__
constexpr int64_t kChunkRows = 131072;  // packed in one go: workspace for them is all that grows with the rows
#else
constexpr int64_t kChunkRows = 1024;  // few, so that small pools already take several
#endif
constexpr int64_t kMatrixLimit = 16384;  // candidates whose distances are all found before the picks

int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

// Rows or centres in the filter's form, and the workspace they live in.
struct PackedTensor {
  Tensor rows, ball;
  Packed view;

  PackedTensor(const Tensor& like, int64_t count, int64_t width)
      : rows(torch::stable::new_empty(like, {count, padded(width)}, ScalarType::Half)),
        ball(torch::stable::new_empty(like, {tiles(count) * kTile, 2}, ScalarType::Float)),
        view{rows.mutable_data_ptr<Half>(), reinterpret_cast<Ball*>(ball.mutable_data_ptr<float>()), count,
             padded(width)} {}
  static int64_t padded(int64_t width) { return (width + kPer16<Half> - 1) / kPer16<Half> * kPer16<Half>; }
};

template <bool kCosine, typename In>
void pack(const Source<In>& from, const double* shift, double scale, const Packed& out, cudaStream_t stream) {
  launch(pack_kernel<kCosine, In>, grid_for(out.count * kWarp, kThreads), dim3(kThreads), 0, stream, from, shift, scale,
         out);
}

// Packs the centres, then the rows chunk by chunk, and calls compare(comparison, first row) for each chunk.
template <bool kCosine, typename T, typename Compare>
void for_each_chunk(const Tensor& pool, const int64_t* rows, const double* centers, const double* shift, double scale,
                    const Sizes& s, cudaStream_t stream, const Compare& compare) {
  const PackedTensor packed_centers(pool, s.centers, s.width);
  const PackedTensor packed_rows(pool, std::min(s.rows, kChunkRows), s.width);
  pack<kCosine>(Source<double>{centers, nullptr, s.centers, s.width}, shift, scale, packed_centers.view, stream);
  for (int64_t begin = 0; begin < s.rows; begin += kChunkRows) {
    Packed chunk = packed_rows.view;
    chunk.count = std::min(s.rows - begin, kChunkRows);
    const Source<T> from{pool.const_data_ptr<T>(), rows + begin, s.samples, s.width};
    pack<kCosine>(from, shift, scale, chunk, stream);
    compare(Comparison<T>{from, centers, chunk, packed_centers.view, Filter(scale, s.width)}, begin);
  }
}

dim3 blocks_for(const Packed& rows) { return dim3(std::min(tiles(rows.count), kMaxBlocks)); }

// Calls body(tag of the dtype, whether cosine) with both known to the compiler.
template <typename Body>
void dispatch(ScalarType type, const char* op, int64_t metric, Body&& body) {
  dispatch_floating(type, op,
                    [&](auto tag) { metric == kCosine ? body(tag, std::true_type{}) : body(tag, std::false_type{}); });
}

std::tuple<Tensor, Tensor> fold_cuda(const Tensor& pool_, const Tensor& rows_, const Tensor& start_,
                                     const Tensor& centers_, const Tensor& shift_, const Tensor& delta_,
                                     const Tensor& owner_, double scale, int64_t metric) {
  constexpr const char* op = "kcenter_fold";
  const Sizes s = check_pool(op, pool_, rows_, centers_, shift_, metric);
  check_argument(op, "start", start_, {s.rows}, "[A]", ScalarType::Long, pool_);
  check_argument(op, "delta", delta_, {s.rows}, "[A]", ScalarType::Double, pool_);
  check_argument(op, "owner", owner_, {s.rows}, "[A]", ScalarType::Long, pool_);
  const OnDeviceOf device(pool_);
  const Tensor pool = torch::stable::contiguous(pool_), rows = torch::stable::contiguous(rows_),
               start = torch::stable::contiguous(start_), centers = torch::stable::contiguous(centers_),
               shift = torch::stable::contiguous(shift_), delta = torch::stable::contiguous(delta_),
               owner = torch::stable::contiguous(owner_);
  if (s.samples == 0 || s.centers == 0) return {torch::stable::clone(delta), torch::stable::clone(owner)};
  Tensor delta_out = torch::stable::new_empty(delta, {s.rows}), owner_out = torch::stable::new_empty(owner, {s.rows});
  dispatch(pool.scalar_type(), op, metric, [&](auto tag, auto cosine) {
    using T = typename decltype(tag)::type;
    constexpr bool kCosine = decltype(cosine)::value;
    for_each_chunk<kCosine, T>(
        pool, rows.const_data_ptr<int64_t>(), centers.const_data_ptr<double>(), shift.const_data_ptr<double>(), scale,
        s, device.stream, [&](const Comparison<T>& comparison, int64_t begin) {
          launch(fold_kernel<kCosine, T>, blocks_for(comparison.x), dim3(kTileThreads), kProductBytes, device.stream,
                 comparison, start.const_data_ptr<int64_t>() + begin, delta.const_data_ptr<double>() + begin,
                 owner.const_data_ptr<int64_t>() + begin, delta_out.mutable_data_ptr<double>() + begin,
                 owner_out.mutable_data_ptr<int64_t>() + begin);
        });
  });
  return {delta_out, owner_out};
}

Tensor count_cuda(const Tensor& pool_, const Tensor& rows_, const Tensor& centers_, const Tensor& shift_, double radius,
                  double scale, int64_t metric) {
  constexpr const char* op = "kcenter_count";
  const Sizes s = check_pool(op, pool_, rows_, centers_, shift_, metric);
  const OnDeviceOf device(pool_);
  const Tensor pool = torch::stable::contiguous(pool_), rows = torch::stable::contiguous(rows_),
               centers = torch::stable::contiguous(centers_), shift = torch::stable::contiguous(shift_);
  if (s.samples == 0) return torch::stable::new_zeros(rows, {s.rows});
  Tensor out = torch::stable::new_empty(rows, {s.rows});
  dispatch(pool.scalar_type(), op, metric, [&](auto tag, auto cosine) {
    using T = typename decltype(tag)::type;
    constexpr bool kCosine = decltype(cosine)::value;
    for_each_chunk<kCosine, T>(
        pool, rows.const_data_ptr<int64_t>(), centers.const_data_ptr<double>(), shift.const_data_ptr<double>(), scale,
        s, device.stream, [&](const Comparison<T>& comparison, int64_t begin) {
          launch(count_kernel<kCosine, T>, blocks_for(comparison.x), dim3(kTileThreads), kProductBytes, device.stream,
                 comparison, radius, out.mutable_data_ptr<int64_t>() + begin);
        });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scan_cuda(const Tensor& pool_) {
  constexpr const char* op = "kcenter_scan";
  check_floating(pool_, op, "pool");
  check_shape(pool_, op, "pool", {-1, -1}, "[N, d]");
  const OnDeviceOf device(pool_);
  const Tensor pool = torch::stable::contiguous(pool_);
  const int64_t n = pool.size(0), d = pool.size(1), blocks = (n + kScanBlock - 1) / kScanBlock;
  Tensor sums = torch::stable::new_empty(pool, {d}, ScalarType::Double),
         checksum = torch::stable::new_empty(pool, {n}, ScalarType::Long),
         largest = torch::stable::new_empty(pool, {1}, ScalarType::Double),
         bad = torch::stable::new_empty(pool, {1}, ScalarType::Long),
         largest_bits = torch::stable::new_empty(pool, {1}, ScalarType::Long),
         block_sums = torch::stable::new_empty(pool, {blocks, d}, ScalarType::Double);
  auto* const most = reinterpret_cast<unsigned long long*>(largest_bits.mutable_data_ptr<int64_t>());
  auto* const worst = reinterpret_cast<unsigned long long*>(bad.mutable_data_ptr<int64_t>());
  const auto frame = [&](double* sums_out) {
    launch(scan_frame_kernel, sums_out ? grid_for(std::max<int64_t>(d, 1), kThreads) : dim3(1), dim3(kThreads), 0,
           device.stream, block_sums.const_data_ptr<double>(), blocks, n, d, most, worst, sums_out,
           largest.mutable_data_ptr<double>());
  };
  frame(nullptr);
  dispatch_floating(pool.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(scan_rows_kernel<T>, grid_for(n * kWarp, kThreads), dim3(kThreads), 0, device.stream,
           pool.const_data_ptr<T>(), n, d, checksum.mutable_data_ptr<int64_t>(), most, worst);
    launch(column_sums_kernel<T>, dim3(blocks), dim3(kThreads), 0, device.stream, pool.const_data_ptr<T>(), n, d,
           block_sums.mutable_data_ptr<double>());
  });
  frame(sums.mutable_data_ptr<double>());
  return {sums, checksum, largest, bad};
}

Tensor rank_cuda(const Tensor& score_, int64_t count) {
  check_rank("kcenter_rank", score_, count);
  const OnDeviceOf device(score_);
  const Tensor score = torch::stable::contiguous(score_);
  const int64_t n = score.size(0);
  constexpr int64_t kHalf = int64_t{1} << 32;
  Tensor low = torch::stable::new_empty(score, {n}, ScalarType::Long),
         high = torch::stable::new_empty(score, {n}, ScalarType::Long);
  launch(rank_keys_kernel, grid_for(n, kThreads), dim3(kThreads), 0, device.stream, score.const_data_ptr<double>(), n,
         low.mutable_data_ptr<int64_t>(), high.mutable_data_ptr<int64_t>());
  const Tensor by_low = sorted_positions(low, kHalf, device.stream);
  Tensor order = sorted_positions(high, kHalf, device.stream, &by_low);
  return torch::stable::clone(torch::stable::narrow(order, 0, 0, std::min(count, n)));
}

std::tuple<Tensor, Tensor> greedy_cuda(const Tensor& candidates_, const Tensor& weight_, const Tensor& delta_,
                                       const Tensor& index_, const Tensor& bound_, const Tensor& bound_index_,
                                       int64_t limit, int64_t metric) {
  constexpr const char* op = "kcenter_greedy";
  check_greedy(op, candidates_, weight_, delta_, index_, bound_, bound_index_, limit, metric);
  const OnDeviceOf device(candidates_);
  const Tensor candidates = torch::stable::contiguous(candidates_), weight = torch::stable::contiguous(weight_),
               delta = torch::stable::contiguous(delta_), index = torch::stable::contiguous(index_);
  const int64_t m = candidates.size(0), d = candidates.size(1);
  const bool all = m <= kMatrixLimit;
  Tensor picks = torch::stable::new_empty(index, {limit}), scores = torch::stable::new_empty(delta, {limit}),
         norms = torch::stable::new_empty(delta, {metric == kCosine ? m : 0}),
         distances = torch::stable::new_empty(delta, {all ? m : 0, m}), now = torch::stable::new_empty(delta, {m});
  dispatch(candidates.scalar_type(), op, metric, [&](auto tag, auto cosine) {
    using T = typename decltype(tag)::type;
    constexpr bool kCosine = decltype(cosine)::value;
    const T* x = candidates.const_data_ptr<T>();
    double* const norm = norms.mutable_data_ptr<double>();
    double* const matrix = all ? distances.mutable_data_ptr<double>() : nullptr;
    if (kCosine) {
      launch(norms_kernel<T>, grid_for(m * kGroup, kThreads), dim3(kThreads), 0, device.stream, x, m, d, norm);
    }
    if (all) {
      const dim3 grid((m + kMatrixColumns - 1) / kMatrixColumns, (m + kMatrixRows - 1) / kMatrixRows);
      launch(distances_kernel<kCosine, T>, grid, dim3(kThreads), 0, device.stream, x, norm, m, d, matrix);
    }
    launch(greedy_kernel<kCosine, T>, dim3(1), dim3(kGreedyThreads), 0, device.stream,
           Candidates<T>{x, norm, matrix, weight.const_data_ptr<double>(), index.const_data_ptr<int64_t>(), m, d},
           delta.const_data_ptr<double>(), bound_.const_data_ptr<double>(), bound_index_.const_data_ptr<int64_t>(),
           limit, now.mutable_data_ptr<double>(), picks.mutable_data_ptr<int64_t>(), scores.mutable_data_ptr<double>());
  });
  return {picks, scores};
}

}  // namespace
}  // namespace msacore::kcenter::cuda

MSACORE_CUDA_LIBRARY(m) {
  m.impl("kcenter_scan", TORCH_BOX(&msacore::kcenter::cuda::scan_cuda));
  m.impl("kcenter_rank", TORCH_BOX(&msacore::kcenter::cuda::rank_cuda));
  m.impl("kcenter_greedy", TORCH_BOX(&msacore::kcenter::cuda::greedy_cuda));
  m.impl("kcenter_fold", TORCH_BOX(&msacore::kcenter::cuda::fold_cuda));
  m.impl("kcenter_count", TORCH_BOX(&msacore::kcenter::cuda::count_cuda));
}
