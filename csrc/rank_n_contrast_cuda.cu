// Rank-N-Contrast on CUDA: checks, workspace and launches, in strips of anchors so that no N × N matrix exists.
#include <algorithm>

#include "common/cuda.cuh"
#include "rank_n_contrast.h"
#include "rank_n_contrast_kernels.cuh"

namespace msacore::rank_n_contrast {
namespace {

#ifdef __CUDACC__
constexpr int64_t kStripBytes = int64_t{256} << 20;
#else
constexpr int64_t kStripBytes = 64 << 10;  // little, so that small inputs already take several strips
#endif

unsigned tiles(int64_t count) { return static_cast<unsigned>((count + kTile - 1) / kTile); }

// The samples in order, and room for a strip of anchors.
template <typename T, typename Target>
struct Workspace {
  using A = acc_t<T>;
  using TargetType = Target;
  Tensor sample, target, rows, unmasked, distances, scratch;
  Ranked<A, Target> ranked;
  int64_t strip;

  Workspace(const Inputs& in, const Sizes& s, cudaStream_t stream) {
    const ScalarType dtype = acc_dtype(in.embeddings.scalar_type());
    ranked.count = s.samples;
    ranked.padded = int64_t{tiles(s.samples)} * kTile;
    ranked.d = s.width;
    ranked.width = (s.width + kDepth - 1) / kDepth * kDepth;
    const int64_t bytes_per_tile = ranked.padded * kTile * (sizeof(A) + 2 * sizeof(double));
    strip = std::min(ranked.padded, kTile * std::max<int64_t>(1, kStripBytes / std::max<int64_t>(1, bytes_per_tile)));
    sample = torch::stable::new_empty(in.embeddings, {s.samples}, ScalarType::Long);
    target = torch::stable::new_empty(in.embeddings, {s.samples}, acc_dtype(in.targets.scalar_type()));
    rows = torch::stable::new_empty(in.embeddings, {ranked.padded * ranked.width}, dtype);
    unmasked = torch::stable::new_empty(in.embeddings, {1}, ScalarType::Long);
    distances = torch::stable::new_empty(in.embeddings, {strip * ranked.padded}, dtype);
    scratch = torch::stable::new_empty(in.embeddings, {strip * ranked.padded * 2}, ScalarType::Double);
    ranked.sample = sample.mutable_data_ptr<int64_t>();
    ranked.target = target.mutable_data_ptr<acc_t<Target>>();
    ranked.rows = rows.mutable_data_ptr<A>();
    ranked.unmasked = unmasked.mutable_data_ptr<int64_t>();
    launch(rank_kernel<T, Target>, grid_for(ranked.padded, kThreads), dim3(kThreads), 0, stream,
           in.embeddings.template const_data_ptr<T>(), in.targets.template const_data_ptr<Target>(),
           in.mask ? in.mask->const_data_ptr<bool>() : nullptr, ranked);
  }

  // Calls body(first, anchors) for every strip, whose anchors are done with: losses or factors.
  template <bool Backward, typename Body>
  void for_strips(double temperature, const A* grad_out, double* losses, cudaStream_t stream, Body&& body) {
    A* const distance = distances.mutable_data_ptr<A>();
    for (int64_t first = 0; first < ranked.padded; first += strip) {
      const int64_t size = std::min(strip, ranked.padded - first);
      launch(distance_kernel<A>, dim3(tiles(ranked.padded), tiles(size)), dim3(kThreads), 0, stream, ranked.rows,
             ranked.width, first, ranked.padded, distance);
      launch(anchor_kernel<Backward, A, Target>, dim3(static_cast<unsigned>(size)), dim3(kThreads), 0, stream, ranked,
             first, 1 / temperature, grad_out, distance, scratch.mutable_data_ptr<double>(), losses);
      body(first, size);
    }
  }
};

// Calls body(workspace) where there are pairs.
template <typename T, typename Body>
void with_workspace(const char* op, const Inputs& in, const Sizes& s, cudaStream_t stream, Body&& body) {
  if (s.samples < 2) return;
  dispatch_floating(in.targets.scalar_type(), op, [&](auto tag) {
    Workspace<T, typename decltype(tag)::type> workspace(in, s, stream);
    body(workspace);
  });
}

Tensor forward_cuda(const Tensor& embeddings, const Tensor& targets, const std::optional<Tensor>& mask,
                    double temperature) {
  constexpr const char* op = "rank_n_contrast";
  const Inputs given{embeddings, targets, mask};
  const Sizes s = check_inputs(op, given, temperature);
  const OnDeviceOf device(embeddings);
  const Inputs in = contiguous(given);
  Tensor out = torch::stable::new_empty(embeddings, {}, acc_dtype(embeddings.scalar_type()));
  if (s.samples < 2) torch::stable::zero_(out);
  dispatch_floating(embeddings.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    with_workspace<T>(op, in, s, device.stream, [&](auto& workspace) {
      const int64_t anchors = workspace.ranked.padded;
      Tensor losses = torch::stable::new_empty(embeddings, {anchors}, ScalarType::Double);
      double* const loss = losses.mutable_data_ptr<double>();
      workspace.template for_strips<false>(temperature, nullptr, loss, device.stream, [](int64_t, int64_t) {});
      launch(mean_kernel<A>, dim3(1), dim3(kThreads), 0, device.stream, loss, anchors, workspace.ranked.unmasked,
             out.mutable_data_ptr<A>());
    });
  });
  return out;
}

Tensor backward_cuda(const Tensor& grad_out, const Tensor& embeddings, const Tensor& targets,
                     const std::optional<Tensor>& mask, double temperature) {
  constexpr const char* op = "rank_n_contrast_backward";
  const Inputs given{embeddings, targets, mask};
  const Sizes s = check_inputs(op, given, temperature);
  check_gradient(op, given, grad_out);
  const OnDeviceOf device(embeddings);
  const Inputs in = contiguous(given);
  Tensor grad = torch::stable::new_empty(embeddings, {s.samples, s.width});
  if (s.samples < 2) torch::stable::zero_(grad);
  dispatch_floating(embeddings.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    with_workspace<T>(op, in, s, device.stream, [&](auto& workspace) {
      const auto& ranked = workspace.ranked;
      Tensor sums =
          torch::stable::new_empty(embeddings, {ranked.padded * ranked.width}, acc_dtype(embeddings.scalar_type()));
      A* const sum = sums.mutable_data_ptr<A>();
      const A* const factors = workspace.distances.template const_data_ptr<A>();
      workspace.template for_strips<true>(
          temperature, grad_out.const_data_ptr<A>(), nullptr, device.stream, [&](int64_t first, int64_t size) {
            launch(pull_kernel<false, A>, dim3(tiles(ranked.width), tiles(ranked.padded)), dim3(kThreads), 0,
                   device.stream, ranked.rows, ranked.width, factors, ranked.padded, 0, first, size, first > 0, sum);
            launch(pull_kernel<true, A>, dim3(tiles(ranked.width), tiles(size)), dim3(kThreads), 0, device.stream,
                   ranked.rows, ranked.width, factors, ranked.padded, first, 0, ranked.padded, true, sum);
          });
      launch(scatter_kernel<T, typename std::decay_t<decltype(workspace)>::TargetType>,
             grid_for(s.samples, kThreads / kWarp), dim3(kThreads), 0, device.stream, ranked, sum,
             grad.mutable_data_ptr<T>());
    });
  });
  return grad;
}

}  // namespace
}  // namespace msacore::rank_n_contrast

MSACORE_CUDA_LIBRARY(m) {
  m.impl("rank_n_contrast", TORCH_BOX(&msacore::rank_n_contrast::forward_cuda));
  m.impl("rank_n_contrast_backward", TORCH_BOX(&msacore::rank_n_contrast::backward_cuda));
}
