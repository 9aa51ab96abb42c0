// Low-rank fusion on CUDA: checks, scratch memory and launches.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cuda/registration.cuh"
#include "cuda/sum_shares.cuh"
#include "low_rank_fusion/low_rank_fusion.h"
#include "low_rank_fusion/low_rank_fusion_kernels.cuh"

namespace msacore::low_rank_fusion::cuda {
using namespace msacore::cuda;
namespace {

// Contiguous arguments, and the problem that points at them.
template <typename T>
struct Operands {
  std::vector<Tensor> keep;
  Problem<T> problem{};

  Operands(const char* op, const Inputs& in, const Sizes& s) {
    check(s.modalities <= kMaxModalities, op, "expected `features` to hold at most ", kMaxModalities,
          " modalities on a GPU, got ", s.modalities);
    check(s.rank < 1 << 16, op, "expected `rank_weight` to hold at most 65535 ranks on a GPU, got ", s.rank);
    const auto aligned = [](const T* rows, int64_t width) {
      return width % kPer16<T> == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0;
    };
    problem.factors_aligned = true;
    for (int64_t m = 0; m < s.modalities; ++m) {
      problem.x[m] = own<T>(in.features[m]);
      problem.factors[m] = own<T>(in.factors[m]);
      problem.features[m] = s.features[m];
      problem.aligned[m] = aligned(problem.x[m], s.features[m]);
      problem.factors_aligned = problem.factors_aligned && aligned(problem.factors[m], s.width);
    }
    problem.rank_weight = own<T>(in.rank_weight);
    problem.bias = own<T>(in.bias);
    problem.available = in.available ? own<bool>(*in.available) : nullptr;
    problem.batch = s.batch, problem.rank = s.rank, problem.width = s.width;
    problem.width_stride = s.padded_width();
    problem.modalities = static_cast<int>(s.modalities);
  }
  template <typename Value>
  const Value* own(const Tensor& t) {
    keep.push_back(torch::stable::contiguous(t));
    return keep.back().template const_data_ptr<Value>();
  }
};

// Computes the projections of all modalities and ranks, in `kept` unless that is empty.
template <typename T>
Tensor project(const Problem<T>& p, const Sizes& s, const Tensor& kept, cudaStream_t stream) {
  Tensor a = kept.size(0) > 0 ? kept : empty_tensor(kept, s.projections(s.modalities));
  launch(project_kernel<T>, dim3(tiles_of(p.batch) * tiles_of(p.width), p.rank, p.modalities), dim3(kTileThreads),
         kProjectBytes<T>, stream, p, a.mutable_data_ptr<acc_t<T>>());
  return a;
}

void forward(const char* op, const Inputs& in, const Sizes& s, Tensor& out, Tensor& projections) {
  const OnDeviceOf device(out);
  dispatch_floating(out.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Operands<T> operands(op, in, s);
    const Tensor a = project(operands.problem, s, projections, device.stream);
    launch(combine_kernel<T>, grid_for(s.batch * s.width, kThreads), dim3(kThreads), 0, device.stream, operands.problem,
           a.const_data_ptr<acc_t<T>>(), out.mutable_data_ptr<T>());
  });
}

template <typename T>
void backward(const Problem<T>& p, const Tensor& grad_out, const Tensor& projections, const Gradients<T>& grads,
              GradTensors& results, cudaStream_t stream) {
  using A = acc_t<T>;
  const int64_t count = p.batch * p.width_stride;
  const int64_t widest = *std::max_element(p.features, p.features + p.modalities);
  const auto scratch = [&](std::initializer_list<int64_t> sizes) { return empty_tensor(projections, sizes); };
  const unsigned blocks = grid_for((count + 3) / 4, kThreads).x;
  Tensor shares = scratch({blocks, p.rank}), grad_a = scratch({p.modalities, p.rank, p.batch, p.width_stride});
  const T* const grad = grad_out.const_data_ptr<T>();
  A* const grad_projections = grad_a.mutable_data_ptr<A>();
  launch(combine_backward_kernel<T>, dim3(blocks, p.rank), dim3(kThreads), 0, stream, p, grad,
         projections.const_data_ptr<A>(), grad_projections, shares.mutable_data_ptr<A>());
  sum_shares(shares.const_data_ptr<A>(), int64_t{blocks}, p.rank, results.rank_weight.mutable_data_ptr<T>(), p.rank,
             stream);
  sum_shares(grad, p.batch, p.width, results.bias.mutable_data_ptr<T>(), p.width, stream);
  launch(factor_grads_kernel<T>, dim3(tiles_of(widest + 1) * tiles_of(p.width), p.rank, p.modalities),
         dim3(kTileThreads), kFactorBytes<T>, stream, p, grad_projections, grads, widest);
  launch(feature_grads_kernel<T>, dim3(tiles_of(p.batch) * tiles_of(widest), 1, p.modalities), dim3(kTileThreads),
         kFeatureBytes<T>, stream, p, grad_projections, grads, widest);
}

void backward(const char* op, const Inputs& in, const Sizes& s, const Tensor& grad_out_, const Tensor& projections,
              GradTensors& results) {
  const OnDeviceOf device(grad_out_);
  const Tensor grad_out = torch::stable::contiguous(grad_out_);
  dispatch_floating(grad_out.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Operands<T> operands(op, in, s);
    Gradients<T> grads{};
    for (int64_t m = 0; m < s.modalities; ++m) {
      grads.features[m] = results.features[m].mutable_data_ptr<T>();
      grads.factors[m] = results.factors[m].mutable_data_ptr<T>();
    }
    const bool kept = projections.size(0) > 0;
    const Tensor a = kept ? projections : project(operands.problem, s, projections, device.stream);
    backward(operands.problem, grad_out, a, grads, results, device.stream);
  });
}

using Operators = LowRankOperators<forward, backward>;

}  // namespace
}  // namespace msacore::low_rank_fusion::cuda

MSACORE_CUDA_LIBRARY(m) {
  m.impl("low_rank_fusion", TORCH_BOX(&msacore::low_rank_fusion::cuda::Operators::low_rank_fusion));
  m.impl("low_rank_fusion_backward", TORCH_BOX(&msacore::low_rank_fusion::cuda::Operators::low_rank_fusion_backward));
}
