// Low-rank fusion on the CPU. The projections a_mr = [x_m; 1] factors_m[r] are products of one rank each and are kept
// for the backward pass; everything between them is one pass over rows.
#include "low_rank_fusion.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/product.h"
#include "common/simd.h"

namespace msacore::low_rank_fusion {
namespace {

// out[b] = bias + Σ_r rank_weight[r] Π_m a[m, r, b] for rows begin … end.   a [M, r, B, h]
template <typename A>
MSACORE_SIMD void combine(const A* __restrict__ a, const A* __restrict__ rank_weight, const A* __restrict__ bias,
                          A* __restrict__ out, A* __restrict__ product, int64_t modalities, int64_t rank, int64_t batch,
                          int64_t width, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    A* __restrict__ row = out + (b - begin) * width;
    for (int64_t j = 0; j < width; ++j) row[j] = bias[j];
    for (int64_t r = 0; r < rank; ++r) {
      for (int64_t j = 0; j < width; ++j) product[j] = rank_weight[r];
      for (int64_t m = 0; m < modalities; ++m) {
        const A* __restrict__ factor = a + ((m * rank + r) * batch + b) * width;
        for (int64_t j = 0; j < width; ++j) product[j] *= factor[j];
      }
      for (int64_t j = 0; j < width; ++j) row[j] += product[j];
    }
  }
}

// For one rank: grad_a[m] = weight · grad_out · Π_{n ≠ m} a[n], and the gradient of the weight.   a, grad_a: members of
// modality m start at m · stride and are [B, h]
template <typename A>
MSACORE_SIMD double combine_backward(const A* __restrict__ a, const A* __restrict__ grad_out, A* __restrict__ grad_a,
                                     A weight, int64_t modalities, int64_t stride, int64_t batch, int64_t width) {
  double grad_weight = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const A* __restrict__ g = grad_out + b * width;
    for (int64_t m = 0; m < modalities; ++m) {
      A* __restrict__ target = grad_a + m * stride + b * width;
      for (int64_t j = 0; j < width; ++j) target[j] = g[j];
      for (int64_t n = 0; n < modalities; ++n) {
        if (n == m) continue;
        const A* __restrict__ factor = a + n * stride + b * width;
        for (int64_t j = 0; j < width; ++j) target[j] *= factor[j];
      }
      if (m == 0) {
        const A* __restrict__ own = a + b * width;
        A dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < width; ++j) dot += target[j] * own[j];
        grad_weight += dot;
      }
      for (int64_t j = 0; j < width; ++j) target[j] *= weight;
    }
  }
  return grad_weight;
}

template <typename A>
MSACORE_SIMD void add_to_rows(const Block<A>& rows, const A* __restrict__ extra) {
  for (int64_t i = 0; i < rows.rows; ++i)
    for (int64_t j = 0; j < rows.cols; ++j) rows.row(i)[j] += extra[j];
}

template <typename A>
MSACORE_SIMD void column_sums(const A* __restrict__ rows, int64_t count, int64_t width, double* __restrict__ sum) {
  std::fill_n(sum, width, 0.0);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < width; ++j) sum[j] += rows[i * width + j];
}

// Arguments in their accumulation type, the features with zeros where a modality is missing.
template <typename T>
struct Operands {
  using A = acc_t<T>;
  std::vector<Tensor> keep;
  Scratch scratch;
  std::vector<Block<const A>> x;
  std::vector<const A*> factors;
  std::vector<char> complete;  // no sample lacks this modality
  const A *rank_weight, *bias;
  const bool* available = nullptr;

  Operands(const Inputs& in, const Sizes& s) {
    if (in.available) available = own<bool>(contiguous_as(*in.available));
    rank_weight = parameter(in.rank_weight);
    bias = parameter(in.bias);
    for (int64_t m = 0; m < s.modalities; ++m) {
      factors.push_back(parameter(in.factors[m]));
      const T* feature = own<T>(contiguous_as(in.features[m]));
      complete.push_back(true);
      for (int64_t b = 0; b < s.batch; ++b) complete[m] = complete[m] && has(b, m, s);
      x.push_back({visible(feature, m, s), s.batch, s.features[m], s.features[m]});
    }
  }
  bool has(int64_t b, int64_t m, const Sizes& s) const { return !available || available[b * s.modalities + m]; }

  // factors_m[r] without its last row, [d_m, h]; the last row follows it.
  Block<const A> factor(int64_t m, int64_t r, const Sizes& s) const {
    return {factors[m] + r * (s.features[m] + 1) * s.width, s.features[m], s.width, s.width};
  }

 private:
  template <typename Value>
  const Value* own(Tensor t) {
    keep.push_back(std::move(t));
    return keep.back().template const_data_ptr<Value>();
  }
  const A* parameter(const Tensor& t) { return own<A>(contiguous_as(t, acc_dtype(t.scalar_type()))); }
  const A* visible(const T* feature, int64_t m, const Sizes& s) {
    if constexpr (std::is_same_v<T, A>)
      if (complete[m]) return feature;
    const int64_t d = s.features[m];
    A* packed = scratch.take<A>(s.batch * d);
    for (int64_t b = 0; b < s.batch; ++b) {
      if (has(b, m, s))
        convert(feature + b * d, packed + b * d, d);
      else
        std::fill_n(packed + b * d, d, A(0));
    }
    return packed;
  }
};

// How many tasks of so many multiplications are worth a thread.
int64_t grain(int64_t work) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work)); }

// Calls body(m, begin, end) with rows begin … end of the batch, for every modality and every part of `rows` rows. The
// modalities of a part follow each other: widths differ, and each thread gets neighbouring tasks.
template <typename Body>
void each_part(const Sizes& s, int64_t rows, Body&& body) {
  const int64_t parts = (s.batch + rows - 1) / rows;
  const int64_t widest = *std::max_element(s.features.begin(), s.features.end());
  torch::stable::parallel_for(0, s.modalities * parts, grain(rows * s.rank * s.width * widest),
                              [&](int64_t first, int64_t last) {
                                for (int64_t task = first; task < last; ++task) {
                                  const int64_t begin = task / s.modalities * rows;
                                  body(task % s.modalities, begin, std::min(s.batch, begin + rows));
                                }
                              });
}

// Rows of a part: all of a small batch, so that it stays on one thread per modality.
int64_t part_rows(const Sizes& s) { return std::clamp<int64_t>((s.batch + 7) / 8, 32, 256); }

template <typename T>
void forward(const Operands<T>& in, const Sizes& s, T* out, acc_t<T>* projections) {
  using A = acc_t<T>;
  each_part(s, part_rows(s), [&](int64_t m, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < s.rank; ++r) {
      const Block<const A> factor = in.factor(m, r, s);
      const Block<A> a{projections + ((m * s.rank + r) * s.batch + begin) * s.width, end - begin, s.width, s.width};
      multiply(a, in.x[m].rows_from(begin, end - begin), factor);
      add_to_rows(a, factor.row(factor.rows));
    }
  });
  torch::stable::parallel_for(0, s.batch, grain(2 * s.modalities * s.rank * s.width), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    A *rows = scratch.take<A>((end - begin) * s.width), *product = scratch.take<A>(s.width);
    combine(projections, in.rank_weight, in.bias, rows, product, s.modalities, s.rank, s.batch, s.width, begin, end);
    convert(rows, out + begin * s.width, (end - begin) * s.width);
  });
}

std::tuple<Tensor, Tensor> forward_cpu(const std::vector<Tensor>& features, const std::vector<Tensor>& factors,
                                       const Tensor& rank_weight, const Tensor& bias,
                                       const std::optional<Tensor>& available) {
  constexpr const char* op = "low_rank_fusion";
  const Inputs in{features, factors, rank_weight, bias, available};
  const Sizes s = check_inputs(op, in);
  const ScalarType dtype = features[0].scalar_type();
  Tensor out = torch::stable::new_empty(features[0], {s.batch, s.width});
  Tensor projections =
      torch::stable::new_empty(features[0], {s.modalities, s.rank, s.batch, s.width}, acc_dtype(dtype));
  dispatch_floating(dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    forward(Operands<T>(in, s), s, out.mutable_data_ptr<T>(), projections.mutable_data_ptr<acc_t<T>>());
  });
  return {out, projections};
}

template <typename T>
struct Gradients {
  std::vector<T*> features, factors;
  T *rank_weight, *bias;
};

template <typename T>
void backward(const Operands<T>& in, const Sizes& s, const T* grad_out_, const acc_t<T>* projections,
              const Gradients<T>& grads) {
  using A = acc_t<T>;
  constexpr bool kInPlace = std::is_same_v<T, A>;
  const int64_t count = s.batch * s.width;
  Scratch scratch;
  A* grad_out = scratch.take<A>(count);
  convert(grad_out_, grad_out, count);
  A* grad_a = scratch.take<A>(s.modalities * s.rank * count);  // [M, r, B, h]
  const int64_t widths = std::accumulate(s.features.begin(), s.features.end(), int64_t(0));
  torch::stable::parallel_for(0, s.rank, grain(count * widths), [&](int64_t first, int64_t last) {
    Scratch local;
    double* sums = local.take<double>(s.width);
    A* product = kInPlace ? nullptr : local.take<A>(*std::max_element(s.features.begin(), s.features.end()) * s.width);
    for (int64_t r = first; r < last; ++r) {
      const int64_t stride = s.rank * count;
      grads.rank_weight[r] =
          static_cast<T>(combine_backward(projections + r * count, grad_out, grad_a + r * count, in.rank_weight[r],
                                          s.modalities, stride, s.batch, s.width));
      for (int64_t m = 0; m < s.modalities; ++m) {
        const int64_t d = s.features[m];
        const Block<const A> grad{grad_a + m * stride + r * count, s.batch, s.width, s.width};
        T* target = grads.factors[m] + r * (d + 1) * s.width;
        if constexpr (kInPlace) product = target;
        multiply(Block<A>{product, d, s.width, s.width}, in.x[m].transposed(), grad);
        if constexpr (!kInPlace) convert(product, target, d * s.width);
        column_sums(grad.data, s.batch, s.width, sums);
        convert(sums, target + d * s.width, s.width);
      }
    }
  });
  each_part(s, part_rows(s), [&](int64_t m, int64_t begin, int64_t end) {
    const int64_t d = s.features[m];
    Scratch local;
    T* target = grads.features[m] + begin * d;
    A* product;
    if constexpr (kInPlace)
      product = target;
    else
      product = local.take<A>((end - begin) * d);
    const Block<A> grad_x{product, end - begin, d, d};
    if (s.rank == 0) std::fill_n(product, (end - begin) * d, A(0));
    for (int64_t r = 0; r < s.rank; ++r) {
      const Block<const A> grad{grad_a + ((m * s.rank + r) * s.batch + begin) * s.width, end - begin, s.width, s.width};
      multiply(grad_x, grad, in.factor(m, r, s).transposed(), r > 0);
    }
    if constexpr (!kInPlace) convert(product, target, (end - begin) * d);
    for (int64_t b = begin; b < end; ++b)
      if (!in.has(b, m, s)) std::fill_n(grads.features[m] + b * d, d, T(0));
  });
  double* sums = scratch.take<double>(s.width);
  column_sums(grad_out, s.batch, s.width, sums);
  convert(sums, grads.bias, s.width);
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor> backward_cpu(
    const Tensor& grad_out_, const Tensor& projections_, const std::vector<Tensor>& features,
    const std::vector<Tensor>& factors, const Tensor& rank_weight, const Tensor& bias,
    const std::optional<Tensor>& available) {
  constexpr const char* op = "low_rank_fusion_backward";
  const Inputs in{features, factors, rank_weight, bias, available};
  const Sizes s = check_inputs(op, in);
  check_saved(op, grad_out_, projections_, s, features[0]);
  const Tensor grad_out = contiguous_as(grad_out_), projections = contiguous_as(projections_);
  GradTensors results(s, features[0]);
  dispatch_floating(features[0].scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Gradients<T> grads{{}, {}, results.rank_weight.mutable_data_ptr<T>(), results.bias.mutable_data_ptr<T>()};
    for (int64_t m = 0; m < s.modalities; ++m) {
      grads.features.push_back(results.features[m].mutable_data_ptr<T>());
      grads.factors.push_back(results.factors[m].mutable_data_ptr<T>());
    }
    backward(Operands<T>(in, s), s, grad_out.const_data_ptr<T>(), projections.const_data_ptr<acc_t<T>>(), grads);
  });
  return results.in_order();
}

}  // namespace
}  // namespace msacore::low_rank_fusion

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def(
      "low_rank_fusion(Tensor[] features, Tensor[] factors, Tensor rank_weight, Tensor bias, Tensor? available) -> "
      "(Tensor, Tensor)");
  m.def(
      "low_rank_fusion_backward(Tensor grad_out, Tensor projections, Tensor[] features, Tensor[] factors, Tensor "
      "rank_weight, Tensor bias, Tensor? available) -> (Tensor[], Tensor[], Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  m.impl("low_rank_fusion", TORCH_BOX(&msacore::low_rank_fusion::forward_cpu));
  m.impl("low_rank_fusion_backward", TORCH_BOX(&msacore::low_rank_fusion::backward_cpu));
}
