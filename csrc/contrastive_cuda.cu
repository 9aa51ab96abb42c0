// InfoNCE on CUDA: checks, workspace and launches.
#include <algorithm>
#include <tuple>

#include "common/cuda.cuh"
#include "contrastive.h"
#include "contrastive_gradient_kernels.cuh"

namespace msacore::contrastive {
namespace {

#ifdef __CUDACC__
constexpr int64_t kStatsBytes = int64_t{128} << 20, kGradientStripBytes = int64_t{512} << 20;
#else
constexpr int64_t kStatsBytes = 24 << 10,
                  kGradientStripBytes = 96 << 10;  // little, so that small inputs already take several strips
#endif

int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

unsigned tiles(int64_t count) { return static_cast<unsigned>((count + kTile - 1) / kTile); }

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

InfoNceInputs contiguous(const InfoNceInputs& in) {
  return {torch::stable::contiguous(in.anchors),
          contiguous(in.candidates),
          contiguous(in.learned_temperature),
          contiguous(in.anchor_labels),
          contiguous(in.candidate_labels),
          contiguous(in.weights),
          contiguous(in.anchor_mask),
          contiguous(in.candidate_mask)};
}

template <typename V>
const V* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr<V>() : nullptr;
}

Temperature temperature_of(const char* op, const InfoNceInputs& in, const InfoNceOptions& options) {
  if (!in.learned_temperature) return {nullptr, Temperature::kNumber, options.temperature};
  return dispatch_floating(in.learned_temperature->scalar_type(), op, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr Temperature::Kind kind = std::is_same_v<S, float>    ? Temperature::kFloat
                                       : std::is_same_v<S, double> ? Temperature::kDouble
                                       : std::is_same_v<S, Half>   ? Temperature::kHalf
                                                                   : Temperature::kBFloat16;
    return Temperature{in.learned_temperature->const_data_ptr<S>(), kind, 0};
  });
}

// The problem and the memory its two sides live in.
template <typename T>
struct Workspace {
  using A = acc_t<T>;
  Tensor units, factors, inverse_norms, counts;
  Problem<T> problem;

  Workspace(const char* op, const InfoNceInputs& in, const InfoNceSizes& s, const InfoNceOptions& options,
            const A* row_stats, const A* column_stats, cudaStream_t stream) {
    const Tensor& like = in.anchors;
    const int64_t width = padded(s.width, 32), n = padded(s.anchors, kTile), m = padded(s.candidates, kTile);
    const ScalarType dtype = acc_dtype(like.scalar_type());
    units = torch::stable::new_empty(like, {(n + m) * width});
    factors = torch::stable::new_empty(like, {n + m}, dtype);
    inverse_norms = torch::stable::new_empty(like, {s.anchors + s.candidates}, dtype);
    counts = torch::stable::new_empty(like, {4}, ScalarType::Long);
    T* unit = units.mutable_data_ptr<T>();
    A *factor = factors.mutable_data_ptr<A>(), *inverse_norm = inverse_norms.mutable_data_ptr<A>();
    int64_t* count = counts.mutable_data_ptr<int64_t>();
    const Tensor& candidates = in.candidates ? *in.candidates : in.anchors;
    problem.a = {in.anchors.const_data_ptr<T>(),
                 data_or_null<bool>(in.anchor_mask),
                 data_or_null<int64_t>(in.anchor_labels),
                 s.anchors,
                 s.width,
                 n,
                 width,
                 unit,
                 factor,
                 inverse_norm,
                 count,
                 row_stats};
    problem.b = {candidates.const_data_ptr<T>(),
                 data_or_null<bool>(in.candidate_mask),
                 data_or_null<int64_t>(in.candidate_labels),
                 s.candidates,
                 s.width,
                 m,
                 width,
                 unit + n * width,
                 factor + n,
                 inverse_norm + s.anchors,
                 count + 2,
                 column_stats};
    problem.temperature = temperature_of(op, in, options);
    problem.weights = data_or_null<T>(in.weights);
    problem.both = options.symmetric;
    problem.exclude_self = options.exclude_self;
    problem.mean = options.reduction == kMean;
    problem.per_anchor = options.reduction == kNone;
    const unsigned blocks = grid_for(std::max(n, m), kRowThreads / kWarp).x;
    launch(prepare_kernel<T>, dim3(blocks + 1, 2), dim3(kRowThreads), 0, stream, Sides<T>{problem.a, problem.b});
  }
};

// Calls body(first, rows) for every strip of the anchors.
template <typename Body>
void for_strips(int64_t rows, int64_t strip, Body&& body) {
  for (int64_t first = 0; first < rows; first += strip) body(first, std::min(strip, rows - first));
}

// Rows of a strip, whole tiles of which each takes `bytes` of the `memory`.
int64_t strip_rows(int64_t rows, int64_t bytes, int64_t memory) {
  constexpr int64_t kMostTiles = 65535;  // the limit of gridDim.y
  const int64_t most = std::clamp<int64_t>(memory / std::max<int64_t>(1, bytes), 1, kMostTiles);
  return std::min(rows, most * kTile);
}

template <typename T>
void forward(const Problem<T>& problem, Tensor& loss, Tensor& row_stats, Tensor& column_stats, cudaStream_t stream) {
  using A = acc_t<T>;
  const Side<T>&a = problem.a, &b = problem.b;
  const int64_t across = tiles(b.rows), columns = problem.both ? b.rows : 0, column_anchors = problem.both ? b.n : 0;
  constexpr int64_t kNumbers = sizeof(Stats<A>) / sizeof(A);
  const int64_t strip = strip_rows(a.rows, (across * kTile + columns) * sizeof(Stats<A>), kStatsBytes);
  Tensor row_parts = torch::stable::new_empty(row_stats, {across * strip * kNumbers});
  Tensor column_parts = torch::stable::new_empty(row_stats, {tiles(strip) * columns * kNumbers});
  Tensor running = torch::stable::new_empty(row_stats, {column_anchors * 4}, ScalarType::Double);
  Tensor losses = torch::stable::new_empty(row_stats, {a.n + column_anchors}, ScalarType::Double);
  const auto parts = [](Tensor& t) { return reinterpret_cast<Stats<A>*>(t.mutable_data_ptr<A>()); };
  double* const loss_of = losses.mutable_data_ptr<double>();
  Merge<A> rows{parts(row_parts), across, 0, 0, 0, true, true, nullptr, row_stats.mutable_data_ptr<A>(), loss_of};
  Merge<A> others{parts(column_parts),
                  0,
                  b.rows,
                  0,
                  column_anchors,
                  true,
                  false,
                  reinterpret_cast<Stats<double>*>(running.mutable_data_ptr<double>()),
                  column_stats.mutable_data_ptr<A>(),
                  loss_of + a.n};
  const auto merge = [&] {
    launch(merge_kernel<T>, dim3(grid_for(std::max(rows.n, others.n), kRowThreads).x, problem.both ? 2 : 1),
           dim3(kRowThreads), 0, stream, problem, rows, others);
  };
  for_strips(a.rows, strip, [&](int64_t first, int64_t size) {
    launch(statistics_kernel<T>, dim3(static_cast<unsigned>(across), tiles(size)), dim3(kTileThreads),
           kSimilarityBytes<T>, stream, problem, first, parts(row_parts), parts(column_parts));
    rows.stride = size;
    rows.first = first;
    rows.n = std::min(size, a.n - first);
    others.count = tiles(size);
    others.begin = first == 0;
    others.end = first + size == a.rows;
    merge();
  });
  if (a.rows == 0) {  // the columns are anchors without candidates
    others.end = true;
    merge();
  }
  launch(finish_kernel<A>, dim3(1), dim3(kFinishThreads), 0, stream, rows.losses, rows.stats, a.n, others.losses,
         others.stats, column_anchors, problem.both, problem.mean, problem.per_anchor, loss.mutable_data_ptr<A>());
}

std::tuple<Tensor, Tensor, Tensor> info_nce_cuda(const Tensor& anchors, const OptionalTensor& candidates,
                                                 const OptionalTensor& learned_temperature,
                                                 const OptionalTensor& anchor_labels,
                                                 const OptionalTensor& candidate_labels, const OptionalTensor& weights,
                                                 const OptionalTensor& anchor_mask,
                                                 const OptionalTensor& candidate_mask, double temperature,
                                                 bool symmetric, bool exclude_self, int64_t reduction) {
  constexpr const char* op = "info_nce";
  const InfoNceInputs given{anchors,          candidates, learned_temperature, anchor_labels,
                            candidate_labels, weights,    anchor_mask,         candidate_mask};
  const InfoNceOptions options{temperature, symmetric, exclude_self, reduction};
  const InfoNceSizes s = check_inputs(op, given, options);
  const OnDeviceOf device(anchors);
  const InfoNceInputs in = contiguous(given);
  const ScalarType dtype = acc_dtype(anchors.scalar_type());
  Tensor row_stats = torch::stable::new_empty(anchors, {3, s.anchors}, dtype);
  Tensor column_stats = torch::stable::new_empty(anchors, {3, symmetric ? s.candidates : 0}, dtype);
  Tensor loss = reduction == kNone ? torch::stable::new_empty(anchors, {s.anchors}, dtype)
                                   : torch::stable::new_empty(anchors, {}, dtype);
  dispatch_floating(anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Workspace<T> workspace(op, in, s, options, nullptr, nullptr, device.stream);
    forward<T>(workspace.problem, loss, row_stats, column_stats, device.stream);
  });
  return {loss, row_stats, column_stats};
}

template <typename T>
void backward(const Problem<T>& problem, const acc_t<T>* grad_out, Tensor& grad_anchors, Tensor& grad_candidates,
              Tensor& grad_temperature, Tensor& grad_weights, bool one_tensor, const char* op, cudaStream_t stream) {
  using A = acc_t<T>;
  using G = gradient_t<T>;
  const Side<T>&a = problem.a, &b = problem.b;
  const int64_t across = tiles(b.rows);
  const int64_t strip = strip_rows(a.rows, b.rows * kTile * sizeof(G), kGradientStripBytes);
  Tensor gradients = torch::stable::new_empty(grad_anchors, {strip * b.rows},
                                              std::is_same_v<G, T> ? grad_anchors.scalar_type() : ScalarType::Float);
  Tensor sums =
      torch::stable::new_empty(grad_anchors, {(a.rows + b.rows) * a.width}, acc_dtype(grad_anchors.scalar_type()));
  Tensor slopes = torch::stable::new_empty(grad_anchors, {tiles(a.rows) * across}, ScalarType::Double);
  G* const gradient = gradients.mutable_data_ptr<G>();
  A *const of_a = sums.mutable_data_ptr<A>(), *const of_b = of_a + a.rows * a.width;
  if (a.rows == 0) torch::stable::zero_(sums);
  for_strips(a.rows, strip, [&](int64_t first, int64_t size) {
    launch(gradient_kernel<T>, dim3(static_cast<unsigned>(across), tiles(size)), dim3(kTileThreads),
           kSimilarityBytes<T>, stream, problem, first, grad_out, gradient,
           problem.weights ? grad_weights.mutable_data_ptr<T>() : nullptr, slopes.mutable_data_ptr<double>());
    launch(product_kernel<T, true>, dim3(tiles(a.width), tiles(size)), dim3(kTileThreads), kGradientBytes<T, true>,
           stream, gradient, b.rows, b.unit, b.rows, a.width, false, of_a + first * a.width);
    launch(product_kernel<T, false>, dim3(tiles(a.width), static_cast<unsigned>(across)), dim3(kTileThreads),
           kGradientBytes<T, false>, stream, gradient, b.rows, a.unit + first * a.width, size, a.width, first > 0,
           of_b);
  });
  const auto project = [&](const Side<T>& own, const A* sum, const A* second, Tensor& grad) {
    launch(project_kernel<T>, grid_for(own.n, kRowThreads / kWarp), dim3(kRowThreads), 0, stream, own, sum, b, second,
           problem.temperature, grad.mutable_data_ptr<T>());
  };
  project(a, of_a, one_tensor ? of_b : nullptr, grad_anchors);
  if (!one_tensor) project(b, of_b, nullptr, grad_candidates);
  if (problem.temperature.kind == Temperature::kNumber) return;
  dispatch_floating(grad_temperature.scalar_type(), op, [&](auto tag) {
    using S = typename decltype(tag)::type;
    launch(temperature_kernel<S>, dim3(1), dim3(kFinishThreads), 0, stream, slopes.const_data_ptr<double>(),
           slopes.numel(), problem.temperature, grad_temperature.mutable_data_ptr<S>());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_backward_cuda(
    const Tensor& grad_out, const Tensor& anchors, const OptionalTensor& candidates,
    const OptionalTensor& learned_temperature, const OptionalTensor& anchor_labels,
    const OptionalTensor& candidate_labels, const OptionalTensor& weights, const OptionalTensor& anchor_mask,
    const OptionalTensor& candidate_mask, const Tensor& row_stats, const Tensor& column_stats, double temperature,
    bool symmetric, bool exclude_self, int64_t reduction) {
  constexpr const char* op = "info_nce_backward";
  const InfoNceInputs given{anchors,          candidates, learned_temperature, anchor_labels,
                            candidate_labels, weights,    anchor_mask,         candidate_mask};
  const InfoNceOptions options{temperature, symmetric, exclude_self, reduction};
  const InfoNceSizes s = check_inputs(op, given, options);
  const ScalarType dtype = acc_dtype(anchors.scalar_type());
  check_dtype(grad_out, op, "grad_out", dtype);
  if (reduction == kNone)
    check_shape(grad_out, op, "grad_out", {s.anchors}, "[N]");
  else
    check_shape(grad_out, op, "grad_out", {}, "[]");
  check_dtype(row_stats, op, "anchor_stats", dtype);
  check_shape(row_stats, op, "anchor_stats", {3, s.anchors}, "[3, N]");
  check_dtype(column_stats, op, "candidate_stats", dtype);
  check_shape(column_stats, op, "candidate_stats", {3, symmetric ? s.candidates : 0}, "[3, N'] or [3, 0]");
  const OnDeviceOf device(anchors);
  const InfoNceInputs in = contiguous(given);
  const Tensor grad = torch::stable::contiguous(grad_out), rows = torch::stable::contiguous(row_stats),
               columns = torch::stable::contiguous(column_stats);
  Tensor grad_anchors = torch::stable::new_empty(anchors, {s.anchors, s.width});
  Tensor grad_candidates = torch::stable::new_empty(anchors, {candidates ? s.candidates : 0, s.width});
  Tensor grad_temperature =
      learned_temperature ? torch::stable::new_empty(*learned_temperature, {}) : torch::stable::new_empty(anchors, {0});
  Tensor grad_weights = torch::stable::new_empty(anchors, {weights ? s.anchors : 0, weights ? s.candidates : 0});
  dispatch_floating(anchors.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const Workspace<T> workspace(op, in, s, options, rows.const_data_ptr<A>(),
                                 symmetric ? columns.const_data_ptr<A>() : nullptr, device.stream);
    backward<T>(workspace.problem, grad.const_data_ptr<A>(), grad_anchors, grad_candidates, grad_temperature,
                grad_weights, !candidates, op, device.stream);
  });
  return {grad_anchors, grad_candidates, grad_temperature, grad_weights};
}

}  // namespace
}  // namespace msacore::contrastive

MSACORE_CUDA_LIBRARY(m) {
  m.impl("info_nce", TORCH_BOX(&msacore::contrastive::info_nce_cuda));
  m.impl("info_nce_backward", TORCH_BOX(&msacore::contrastive::info_nce_backward_cuda));
}
