// Rank-N-Contrast on CUDA: checks, workspace and launches, in strips of anchors so that no N × N matrix exists.
#include <algorithm>

#include "common/scratch.cuh"
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
  Ranked<A, Target> ranked;
  int64_t strip;
  A *distances, *gradient;
  double *scans, *losses;
  Scratch scratch;

  Workspace(const Inputs& in, const Sizes& s, bool backward, cudaStream_t stream)
      : ranked(ranked_of(s)), strip(strip_of(ranked)), scratch(in.embeddings, [&](Scratch& memory) {
          memory.take(ranked.sample, ranked.count);
          memory.take(ranked.target, ranked.count);
          memory.take(ranked.rows, ranked.padded * ranked.width);
          memory.take(ranked.unmasked, 1);
          memory.take(distances, strip * ranked.padded);
          memory.take(scans, strip * ranked.padded * 2);
          memory.take(losses, backward ? 0 : ranked.padded);
          memory.take(gradient, backward ? ranked.padded * ranked.width : 0);
        }) {
    launch(rank_kernel<T, Target>, grid_for(ranked.padded, kThreads), dim3(kThreads), 0, stream,
           in.embeddings.template const_data_ptr<T>(), in.targets.template const_data_ptr<Target>(),
           in.mask ? in.mask->const_data_ptr<bool>() : nullptr, ranked);
  }

  static Ranked<A, Target> ranked_of(const Sizes& s) {
    Ranked<A, Target> ranked{};
    ranked.count = s.samples;
    ranked.padded = int64_t{tiles(s.samples)} * kTile;
    ranked.d = s.width;
    ranked.width = (s.width + kDepth - 1) / kDepth * kDepth;
    return ranked;
  }

  static int64_t strip_of(const Ranked<A, Target>& ranked) {
    const int64_t bytes_per_tile = ranked.padded * kTile * (sizeof(A) + 2 * sizeof(double));
    return std::min(ranked.padded, kTile * std::max<int64_t>(1, kStripBytes / bytes_per_tile));
  }

  // Calls body(first, anchors) for every strip, whose anchors are done with: losses or factors.
  template <bool Backward, typename Body>
  void for_strips(double temperature, const A* grad_out, cudaStream_t stream, Body&& body) {
    for (int64_t first = 0; first < ranked.padded; first += strip) {
      const int64_t size = std::min(strip, ranked.padded - first);
      launch(distance_kernel<A>, dim3(tiles(ranked.padded), tiles(size)), dim3(kThreads), 0, stream, ranked.rows,
             ranked.width, first, ranked.padded, distances);
      launch(anchor_kernel<Backward, A, Target>, dim3(static_cast<unsigned>(size)), dim3(kThreads), 0, stream, ranked,
             first, 1 / temperature, grad_out, distances, scans, losses);
      body(first, size);
    }
  }
};

// Calls body(workspace) where there are pairs.
template <typename T, typename Body>
void with_workspace(const char* op, const Inputs& in, const Sizes& s, bool backward, cudaStream_t stream, Body&& body) {
  if (s.samples < 2) return;
  dispatch_floating(in.targets.scalar_type(), op, [&](auto tag) {
    Workspace<T, typename decltype(tag)::type> workspace(in, s, backward, stream);
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
    with_workspace<T>(op, in, s, false, device.stream, [&](auto& workspace) {
      workspace.template for_strips<false>(temperature, nullptr, device.stream, [](int64_t, int64_t) {});
      launch(mean_kernel<A>, dim3(1), dim3(kThreads), 0, device.stream, workspace.losses, workspace.ranked.padded,
             workspace.ranked.unmasked, out.mutable_data_ptr<A>());
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
    with_workspace<T>(op, in, s, true, device.stream, [&](auto& workspace) {
      using Target = typename std::decay_t<decltype(workspace)>::TargetType;
      const auto& ranked = workspace.ranked;
      workspace.template for_strips<true>(
          temperature, grad_out.const_data_ptr<A>(), device.stream, [&](int64_t first, int64_t size) {
            launch(pull_kernel<false, A>, dim3(tiles(ranked.width), tiles(ranked.padded)), dim3(kThreads), 0,
                   device.stream, ranked.rows, ranked.width, workspace.distances, ranked.padded, 0, first, size,
                   first > 0, workspace.gradient);
            launch(pull_kernel<true, A>, dim3(tiles(ranked.width), tiles(size)), dim3(kThreads), 0, device.stream,
                   ranked.rows, ranked.width, workspace.distances, ranked.padded, first, 0, ranked.padded, true,
                   workspace.gradient);
          });
      launch(scatter_kernel<T, Target>, grid_for(s.samples, kThreads / kWarp), dim3(kThreads), 0, device.stream, ranked,
             workspace.gradient, grad.mutable_data_ptr<T>());
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
