// Rank-N-Contrast on CUDA: checks, workspace and launches, in strips of anchors so that no N × N matrix exists.
#include <algorithm>

#include "cuda/scratch.cuh"
#include "rank_n_contrast/rank_n_contrast.h"
#include "rank_n_contrast/rank_n_contrast_scan.cuh"

namespace msacore::rank_n_contrast::cuda {
using namespace msacore::cuda;
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
  Ranked<T> ranked;
  acc_t<Target>* target;
  int64_t strip;
  Near near;
  A *distances, *sums;
  double *scans, *losses;
  Scratch scratch;

  Workspace(const Inputs& in, const Sizes& s, bool backward, cudaStream_t stream)
      : ranked(ranked_of(in, s)),
        strip(strip_of(ranked)),
        near(near_of(ranked.padded, strip)),
        scratch(in.embeddings, [&](Scratch& memory) {
          memory.take(ranked.sample, ranked.count);
          memory.take(target, ranked.count);
          memory.take(ranked.mean, ranked.d);
          memory.take(ranked.rows, ranked.padded * ranked.width);
          memory.take(ranked.square, ranked.padded);
          memory.take(ranked.unmasked, 1);
          memory.take(distances, strip * ranked.padded);
          memory.take(scans, strip * ranked.padded * 2);
          memory.take(losses, backward ? 0 : ranked.padded);
          memory.take(sums, backward ? ranked.padded * ranked.width : 0);
          memory.take(near.by_anchor, strip * near.samples);
          memory.take(near.by_sample, ranked.padded * near.anchors);
        }) {
    const bool* const mask = in.mask ? in.mask->const_data_ptr<bool>() : nullptr;
    launch(embedding_mean_kernel<T>, dim3((ranked.d + kWarp - 1) / kWarp), dim3(kMeanThreads), 0, stream, mask, ranked);
    launch(rank_kernel<T, Target>, grid_for(ranked.padded, kThreads), dim3(kThreads), 0, stream,
           in.targets.template const_data_ptr<Target>(), mask, ranked, target);
  }

  static Ranked<T> ranked_of(const Inputs& in, const Sizes& s) {
    Ranked<T> ranked{};
    ranked.embeddings = in.embeddings.template const_data_ptr<T>();
    ranked.count = s.samples;
    ranked.padded = int64_t{tiles(s.samples)} * kTile;
    ranked.d = s.width;
    ranked.depth = (s.width + kPer16<A> - 1) / kPer16<A> * kPer16<A>;
    ranked.width = ranked.depth + kPer16<A>;
    return ranked;
  }

  static Near near_of(int64_t samples, int64_t anchors) {
    Near near{};
    near.samples = samples / kWordBits;
    near.anchors = anchors / kWordBits;
    return near;
  }

  static int64_t strip_of(const Ranked<T>& ranked) {
    const int64_t bytes_per_tile = ranked.padded * kTile * (sizeof(A) + 2 * sizeof(double));
    return std::min(ranked.padded, kTile * std::max<int64_t>(1, kStripBytes / bytes_per_tile));
  }

  // Calls body(first, anchors) for every strip, whose anchors are done with: losses or factors.
  template <bool Backward, typename Body>
  void for_strips(double temperature, const A* grad_out, cudaStream_t stream, Body&& body) {
    for (int64_t first = 0; first < ranked.padded; first += strip) {
      const int64_t size = std::min(strip, ranked.padded - first);
      launch(distance_kernel<T>, dim3(tiles(ranked.padded), tiles(size)), dim3(kTileThreads),
             kTileBytes<A, A, A, true, true>, stream, ranked, first, distances, near);
      launch(anchor_kernel<Backward, A, Target>, dim3(static_cast<unsigned>(size)), dim3(kThreads), 0, stream, target,
             ranked.unmasked, ranked.padded, near, first, 1 / temperature, grad_out, distances, scans, losses);
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
      const auto& ranked = workspace.ranked;
      workspace.template for_strips<true>(
          temperature, grad_out.const_data_ptr<A>(), device.stream, [&](int64_t first, int64_t size) {
            const auto grid = [&](int64_t samples) { return dim3(tiles(ranked.width), tiles(samples)); };
            launch(pull_kernel<false, A>, grid(ranked.padded), dim3(kTileThreads), kTileBytes<A, A, A, false, false>,
                   device.stream, ranked.rows, ranked.width, workspace.distances, ranked.padded, 0, first, size,
                   first > 0, workspace.sums);
            launch(pull_kernel<true, A>, grid(size), dim3(kTileThreads), kTileBytes<A, A, A, true, false>,
                   device.stream, ranked.rows, ranked.width, workspace.distances, ranked.padded, first, 0,
                   ranked.padded, true, workspace.sums);
            launch(near_kernel<T>, grid_for(ranked.count * kWarp, kThreads), dim3(kThreads), 0, device.stream, ranked,
                   workspace.near, first, size, workspace.scans + ranked.padded, 2 * ranked.padded, workspace.sums);
          });
      launch(scatter_kernel<T>, grid_for(s.samples, kThreads / kWarp), dim3(kThreads), 0, device.stream, ranked,
             workspace.sums, grad.mutable_data_ptr<T>());
    });
  });
  return grad;
}

}  // namespace
}  // namespace msacore::rank_n_contrast::cuda

MSACORE_CUDA_LIBRARY(m) {
  m.impl("rank_n_contrast", TORCH_BOX(&msacore::rank_n_contrast::cuda::forward_cuda));
  m.impl("rank_n_contrast_backward", TORCH_BOX(&msacore::rank_n_contrast::cuda::backward_cuda));
}
