// Matrix fusion on the CPU. With H = (Z_m W_rᵀ) / s, the q×k' rows W_r G = Hᵀ Z_n of a pair need no k'×k' matrix. A
// thread takes a chunk of samples: the products with W_r run over all tokens of the chunk, the pair rows stay in its
// cache.
#include "matrix_fusion/matrix_fusion.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "core/dtype.h"
#include "cpu/parallel.h"
#include "matrix_fusion/matrix_fusion_chunk.h"

namespace msacore::matrix_fusion::cpu {
namespace {

template <typename T, typename Body>
void each_chunk(const Operands<T>& in, const Sizes& s, const Plan& plan, Body&& body) {
  const auto chunk_of_thread = [&] { return Chunk<T>(in, s, plan); };
  parallel_for(0, plan.lanes, 1, chunk_of_thread, [&](Chunk<T>& chunk, int64_t first, int64_t last) {
    for (int64_t lane = first; lane < last; ++lane)
      for (int64_t c = lane; c < plan.chunks; c += plan.lanes) {
        chunk.load(c * plan.chunk, std::min(s.batch, (c + 1) * plan.chunk));
        chunk.project();
        body(chunk, lane);
      }
  });
}

void forward(const char* op, const Inputs& in, const Sizes& s, Tensor& fused, Tensor& pairs) {
  dispatch_floating(in.features[0].scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Operands<T> operands(in, s);
    T *fused_data = fused.mutable_data_ptr<T>(), *pairs_data = pairs.mutable_data_ptr<T>();
    each_chunk(operands, s, Plan(s), [&](Chunk<T>& chunk, int64_t) {
      for (int64_t b = 0; b < chunk.samples(); ++b) chunk.forward(b, fused_data, pairs_data);
    });
  });
}

// Sums over lanes, in their order, of `count` numbers each; lanes lie `stride` numbers apart.
template <typename From, typename T>
void sum_lanes(const From* lanes, int64_t lane_count, int64_t stride, int64_t count, T* out) {
  for (int64_t j = 0; j < count; ++j) {
    From sum = 0;
    for (int64_t lane = 0; lane < lane_count; ++lane) sum += lanes[lane * stride + j];
    out[j] = static_cast<T>(sum);
  }
}

void backward(const char* op, const Inputs& in, const Sizes& s, const Tensor& grad_fused, const Tensor& grad_pairs,
              GradTensors& grads) {
  dispatch_floating(in.features[0].scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const Operands<T> operands(in, s);
    const Plan plan(s);
    const T *fused_data = grad_fused.const_data_ptr<T>(), *pairs_data = grad_pairs.const_data_ptr<T>();
    std::vector<T*> grad_x;
    for (Tensor& t : grads.features) grad_x.push_back(t.mutable_data_ptr<T>());
    const int64_t weights = s.rows * s.width, mixes = s.channels * s.pairs, small = s.rows + mixes + s.channels;
    std::vector<A> weight_lanes(plan.lanes * weights, 0);
    std::vector<double> small_lanes(plan.lanes * small, 0);
    each_chunk(operands, s, plan, [&](Chunk<T>& chunk, int64_t lane) {
      double* sums = small_lanes.data() + lane * small;
      chunk.backward(fused_data, pairs_data, grad_x, weight_lanes.data() + lane * weights,
                     {sums, sums + s.rows, sums + s.rows + mixes});
    });
    const double* sums = small_lanes.data();
    sum_lanes(weight_lanes.data(), plan.lanes, weights, weights, grads.row_weight.mutable_data_ptr<T>());
    sum_lanes(sums, plan.lanes, small, s.rows, grads.row_bias.mutable_data_ptr<T>());
    sum_lanes(sums + s.rows, plan.lanes, small, mixes, grads.pair_weight.mutable_data_ptr<T>());
    sum_lanes(sums + s.rows + mixes, plan.lanes, small, s.channels, grads.pair_bias.mutable_data_ptr<T>());
  });
}

using Operators = MatrixOperators<forward, backward>;

}  // namespace
}  // namespace msacore::matrix_fusion::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def(
      "matrix_fusion(Tensor[] features, Tensor row_weight, Tensor row_bias, Tensor pair_weight, Tensor pair_bias, "
      "Tensor? mask, Tensor? available, *, bool augment, int activation) -> (Tensor, Tensor)");
  m.def(
      "matrix_fusion_backward(Tensor grad_fused, Tensor grad_pairs, Tensor[] features, Tensor row_weight, Tensor "
      "row_bias, Tensor pair_weight, Tensor pair_bias, Tensor? mask, Tensor? available, *, bool augment, int "
      "activation) -> (Tensor[], Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  m.impl("matrix_fusion", TORCH_BOX(&msacore::matrix_fusion::cpu::Operators::matrix_fusion));
  m.impl("matrix_fusion_backward", TORCH_BOX(&msacore::matrix_fusion::cpu::Operators::matrix_fusion_backward));
}
