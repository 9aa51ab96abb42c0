// Matrix fusion on CUDA: checks, scratch memory and launches.
#include <algorithm>
#include <tuple>
#include <vector>

#include "core/round.h"
#include "cuda/registration.cuh"
#include "cuda/sum_shares.cuh"
#include "matrix_fusion/matrix_fusion.h"
#include "matrix_fusion/matrix_fusion_backward_kernels.cuh"

namespace msacore::matrix_fusion::cuda {
using namespace msacore::cuda;
namespace {

#ifdef __CUDACC__
constexpr int64_t kRowGradBytes = int64_t{32} << 20;  // for the gradients of pair rows at a time; an H200 caches 50 MB
#else
constexpr int64_t kRowGradBytes = 64 << 10;  // small, so that even small inputs take several launches
#endif

template <typename T>
int64_t padded(int64_t count) {
  return round_up(count, kPer16<T>);
}

// Contiguous arguments, and the problem that points at them.
template <typename T>
struct Operands {
  using A = acc_t<T>;
  std::vector<Tensor> keep;
  Problem<T> problem{};

  Operands(const char* op, const Inputs& in, const Sizes& s, cudaStream_t stream) {
    check(s.modalities <= kMaxModalities, op, "expected `features` to hold at most ", kMaxModalities,
          " modalities on a GPU, got ", s.modalities);
    check(s.batch * s.length < int64_t(1) << 31, op, "expected B · L below 2^31 on a GPU, got ", s.batch * s.length);
    for (int64_t m = 0; m < s.modalities; ++m) problem.x[m] = own<T>(in.features[m]);
    problem.row_weight = own<T>(in.row_weight);
    problem.row_bias = own<T>(in.row_bias);
    problem.pair_weight = own<T>(in.pair_weight);
    problem.pair_bias = own<T>(in.pair_bias);
    problem.mask = in.mask ? own<bool>(*in.mask) : nullptr;
    problem.available = in.available ? own<bool>(*in.available) : nullptr;
    problem.batch = s.batch, problem.length = s.length, problem.tokens = s.batch * s.length;
    problem.features = s.features, problem.width = s.width, problem.rows = s.rows;
    problem.modalities = static_cast<int>(s.modalities), problem.pairs = static_cast<int>(s.pairs);
    problem.channels = static_cast<int>(s.channels);
    problem.width_stride = padded<T>(s.width), problem.row_stride = padded<T>(s.rows);
    problem.augment = s.augment, problem.activation = s.activation;
    problem.aligned = s.features % kPer16<T> == 0;
    for (int64_t m = 0; m < s.modalities; ++m)
      problem.aligned = problem.aligned && reinterpret_cast<uintptr_t>(problem.x[m]) % 16 == 0;
    Tensor scale = scratch({problem.tokens}), weights = like({s.rows, problem.width_stride});
    launch(prepare_kernel<T>, grid_for(std::max(s.batch * kWarp, weights.numel()), kThreads), dim3(kThreads), 0, stream,
           problem, scale.mutable_data_ptr<A>(), weights.mutable_data_ptr<T>());
    problem.scale = own<A>(scale);
    problem.weights = own<T>(weights);
  }
  template <typename Value>
  const Value* own(const Tensor& t) {
    keep.push_back(torch::stable::contiguous(t));
    return keep.back().template const_data_ptr<Value>();
  }
  Tensor like(std::initializer_list<int64_t> sizes) const { return empty_tensor(keep[0], sizes); }
  Tensor scratch(std::initializer_list<int64_t> sizes) const {
    return empty_tensor(keep[0], sizes, acc_dtype(keep[0].scalar_type()));
  }
};

template <typename T>
Tensor project(const Operands<T>& in, cudaStream_t stream) {
  const Problem<T>& p = in.problem;
  Tensor h = in.like({kParts<T>, p.modalities - 1, p.tokens, p.row_stride});
  launch(project_kernel<T>, dim3(tiles_of(p.tokens), tiles_of(p.rows), p.modalities - 1), dim3(kTileThreads),
         kProjectBytes<T>, stream, p, h.mutable_data_ptr<T>());
  return h;
}

// Blocks of the pair kernels, and the channels that fit into a block's shared memory.
template <typename T>
int64_t pair_blocks(const Problem<T>& p, int64_t samples) {
  return samples * tiles_of(p.rows) * tiles_of(p.width);
}
template <typename T>
int channels_together(const Problem<T>& p) {
  const size_t most = (shared_limit() - PairMemory<T>::kBytes) / PairMemory<T>::kChannelBytes;
  return static_cast<int>(std::min<size_t>(most, p.channels));
}
template <typename T>
size_t pair_bytes(int together) {
  return PairMemory<T>::kBytes + size_t{PairMemory<T>::kChannelBytes} * together;
}

template <typename T>
void launch_forward(const Operands<T>& in, Tensor& fused, Tensor& pairs, cudaStream_t stream) {
  using A = acc_t<T>;
  const Problem<T>& p = in.problem;
  const Tensor h = project(in, stream);
  const int together = channels_together(p);
  Tensor sums = in.scratch({tiles_of(p.width), p.batch, p.pairs + p.channels, p.rows});
  launch(means_kernel<T>, dim3(pair_blocks(p, p.batch)), dim3(kTileThreads), pair_bytes<T>(together), stream, p,
         h.const_data_ptr<T>(), sums.mutable_data_ptr<A>(), together);
  launch(finish_kernel<T>, grid_for(p.batch * (p.pairs + p.channels) * p.rows, kThreads), dim3(kThreads), 0, stream,
         sums.const_data_ptr<A>(), pairs.mutable_data_ptr<T>(), fused.mutable_data_ptr<T>(), p.batch, int64_t{p.pairs},
         int64_t{p.channels}, p.rows, tiles_of(p.width), p.width);
}

void forward(const char* op, const Inputs& in, const Sizes& s, Tensor& fused, Tensor& pairs) {
  const OnDeviceOf device(fused);
  dispatch_floating(in.features[0].scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_forward(Operands<T>(op, in, s, device.stream), fused, pairs, device.stream);
  });
}

template <typename T>
void launch_backward(const Operands<T>& in, const Tensor& grad_fused, const Tensor& grad_pairs, GradTensors& grads,
                     cudaStream_t stream) {
  using A = acc_t<T>;
  const Problem<T>& p = in.problem;
  const Tensor h = project(in, stream);
  Tensor grad_h = in.like({kGradParts<T>, p.modalities - 1, p.tokens, p.row_stride});
  FeatureGrads<T> grad_x{};
  for (int m = 0; m < p.modalities; ++m) grad_x.at[m] = grads.features[m].mutable_data_ptr<T>();
  const int64_t sample_bytes = std::max<int64_t>(1, p.pairs * p.rows * p.width_stride * kParts<T> * sizeof(T));
  const int64_t chunk = std::max<int64_t>(1, std::min(p.batch, kRowGradBytes / sample_bytes));
  Tensor rows = in.like({kParts<T>, chunk, p.pairs, p.rows, p.width_stride});
  const T* const h_data = h.const_data_ptr<T>();
  T* const grad_h_data = grad_h.mutable_data_ptr<T>();

  const int64_t mixes = p.channels * p.pairs, warps = pair_blocks(p, p.batch) * (kTileThreads / kWarp);
  Tensor mix_share = in.scratch({warps, mixes + p.channels});
  Tensor bias_share = in.scratch({p.batch, tiles_of(p.width), p.rows});
  const RowGrads<T> row_grads{grad_fused.const_data_ptr<T>(),  grad_pairs.const_data_ptr<T>(),
                              rows.mutable_data_ptr<T>(),      chunk * p.pairs * p.rows * p.width_stride,
                              mix_share.mutable_data_ptr<A>(), bias_share.mutable_data_ptr<A>()};
  const int together = channels_together(p);
  for (int64_t first = 0; first < p.batch; first += chunk) {
    const int64_t samples = std::min(chunk, p.batch - first), token_tiles = samples * tiles_of(p.length);
    launch(row_grads_kernel<T>, dim3(pair_blocks(p, samples)), dim3(kTileThreads), pair_bytes<T>(together), stream, p,
           h_data, row_grads, first, together);
    launch(h_grads_kernel<T>, dim3(token_tiles * (p.modalities - 1) * tiles_of(p.rows)), dim3(kTileThreads),
           kProjectBytes<T>, stream, p, row_grads, grad_h_data, first);
    launch(feature_grads_kernel<T>, dim3(token_tiles * p.modalities * tiles_of(p.features)), dim3(kTileThreads),
           kFeatureBytes<T>, stream, p, h_data, row_grads, grad_h_data, grad_x, first);
  }
  const A* const mix_shares = mix_share.const_data_ptr<A>();
  sum_shares(mix_shares, warps, mixes + p.channels, grads.pair_weight.mutable_data_ptr<T>(), mixes, stream);
  sum_shares(mix_shares + mixes, warps, mixes + p.channels, grads.pair_bias.mutable_data_ptr<T>(), int64_t{p.channels},
             stream);
  sum_shares(bias_share.const_data_ptr<A>(), p.batch * tiles_of(p.width), p.rows, grads.row_bias.mutable_data_ptr<T>(),
             p.rows, stream);

  constexpr int64_t kTokensPerPart = 512, kMaxParts = 32;
  const int64_t parts = std::clamp<int64_t>(p.tokens / kTokensPerPart, 1, kMaxParts);
  Tensor shares = in.scratch({parts, p.modalities - 1, p.rows, p.width});
  launch(weight_grads_kernel<T>, dim3(tiles_of(p.rows) * tiles_of(p.width), p.modalities - 1, parts),
         dim3(kTileThreads), kWeightBytes<T>, stream, p, grad_h_data, shares.mutable_data_ptr<A>(),
         ceil_div(p.tokens, parts));
  sum_shares(shares.const_data_ptr<A>(), parts * (p.modalities - 1), p.rows * p.width,
             grads.row_weight.mutable_data_ptr<T>(), p.rows * p.width, stream);
}

void backward(const char* op, const Inputs& in, const Sizes& s, const Tensor& grad_fused, const Tensor& grad_pairs,
              GradTensors& grads) {
  const OnDeviceOf device(grad_fused);
  dispatch_floating(in.features[0].scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_backward(Operands<T>(op, in, s, device.stream), grad_fused, grad_pairs, grads, device.stream);
  });
}

using Operators = MatrixOperators<forward, backward>;

}  // namespace
}  // namespace msacore::matrix_fusion::cuda

MSACORE_CUDA_LIBRARY(m) {
  m.impl("matrix_fusion", TORCH_BOX(&msacore::matrix_fusion::cuda::Operators::matrix_fusion));
  m.impl("matrix_fusion_backward", TORCH_BOX(&msacore::matrix_fusion::cuda::Operators::matrix_fusion_backward));
}
