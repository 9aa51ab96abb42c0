// A chunk of samples of matrix fusion: packing of what is visible, products, and their gradients.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/round.h"
#include "cpu/product.h"
#include "cpu/simd.h"
#include "matrix_fusion/matrix_fusion.h"
#include "matrix_fusion/matrix_fusion_rows.h"

namespace msacore::matrix_fusion::cpu {
using namespace msacore::cpu;

// h = (h + extra) · scale for one token.
template <typename A>
MSACORE_SIMD void add_and_scale(A* __restrict__ h, const A* __restrict__ extra, A scale, int64_t count) {
  for (int64_t j = 0; j < count; ++j) h[j] = (h[j] + extra[j]) * scale;
}

template <typename A>
MSACORE_SIMD void add_rows(A* __restrict__ sum, const Block<A>& rows) {
  for (int64_t i = 0; i < rows.rows; ++i)
    for (int64_t j = 0; j < rows.cols; ++j) sum[j] += rows.row(i)[j];
}

// L = 1: row i of a pair is h_i · [x; 1].
template <typename A>
MSACORE_SIMD void outer_row(A* __restrict__ row, A h, const A* __restrict__ x, int64_t k, bool augment) {
  for (int64_t j = 0; j < k; ++j) row[j] = h * x[j];
  if (augment) row[k] = h;
}

// Adds to grad_x and returns the gradient of h.
template <typename A>
MSACORE_SIMD A outer_row_backward(const A* __restrict__ grad_row, A h, const A* __restrict__ x, A* __restrict__ grad_x,
                                  int64_t k, bool augment) {
  A dot = augment ? grad_row[k] : A(0);
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < k; ++j) {
    dot += grad_row[j] * x[j];
    grad_x[j] += h * grad_row[j];
  }
  return dot;
}

template <typename T>
struct Operands {
  using A = acc_t<T>;
  std::vector<Tensor> keep;
  std::vector<const T*> x;
  const A *row_weight, *row_bias;
  Mix<A> mix;
  const bool *mask = nullptr, *available = nullptr;

  Operands(const Inputs& in, const Sizes& s) {
    for (const Tensor& feature : in.features) x.push_back(own<T>(contiguous_as(feature)));
    row_weight = parameter(in.row_weight);
    row_bias = parameter(in.row_bias);
    mix = {parameter(in.pair_weight), parameter(in.pair_bias), s.pairs, s.channels};
    if (in.mask) mask = own<bool>(contiguous_as(*in.mask));
    if (in.available) available = own<bool>(contiguous_as(*in.available));
  }
  template <typename Value>
  const Value* own(Tensor t) {
    keep.push_back(std::move(t));
    return keep.back().template const_data_ptr<Value>();
  }
  const A* parameter(const Tensor& t) { return own<A>(contiguous_as(t, acc_dtype(t.scalar_type()))); }
};

// How samples are distributed: a lane takes every `lanes`-th chunk. Depends on sizes alone, so that sums over lanes
// have the same order for every number of threads.
struct Plan {
  int64_t chunk, chunks, lanes;

  explicit Plan(const Sizes& s) {
    constexpr int64_t kTokens = 512, kLanes = 16, kSmall = int64_t(1) << 20;
    const int64_t length = std::max<int64_t>(1, s.length);
    chunk = std::max<int64_t>(1, kTokens / length);
    if (s.batch * length * s.width * s.rows * s.pairs > kSmall) chunk = std::min(chunk, ceil_div(s.batch, kLanes));
    chunk = std::min(chunk, std::max<int64_t>(1, s.batch));
    chunks = ceil_div(s.batch, chunk);
    lanes = std::min(chunks, kLanes);
  }
};

// One lane's view of some consecutive samples: their valid tokens, packed, and what is computed from them.
template <typename T>
class Chunk {
 public:
  using A = acc_t<T>;

  Chunk(const Operands<T>& in, const Sizes& s, const Plan& plan)
      : in_(in),
        s_(s),
        start_(plan.chunk + 1, 0),
        x_(s.modalities),
        packed_(s.modalities, nullptr),
        complete_(s.modalities),
        offset_(s.pairs),
        present_(std::make_unique<bool[]>(s.pairs)) {
    constexpr int64_t kLine = 16;
    stride_ = round_up(s.width, kLine);
    const bool pooled = s.length == 1;
    for (int64_t n = 1; n < s.modalities; ++n)
      for (int64_t m = 0; m < n; ++m)
        offset_[pair_index(m, n, s.modalities)] = slot(m, n) * (pooled ? 1 : s.rows) * stride_;
    rows_ = scratch_.take<A>(s.pairs * (pooled ? 1 : s.rows) * stride_);
    h_ = scratch_.take<A>(plan.chunk * s.length * left());
    local_ = scratch_.take<A>(2 * s.pairs * kMaxStep);
    sums_ = scratch_.take<A>(left());
    means_ = scratch_.take<A>((s.pairs + s.channels) * s.rows);
  }

  int64_t samples() const { return samples_; }
  int64_t first() const { return first_; }
  int64_t tokens() const { return start_[samples_]; }

  // The valid tokens of samples begin … end; features are used in place where none of them are hidden.
  void load(int64_t begin, int64_t end) {
    first_ = begin, samples_ = end - begin;
    token_.clear();
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t t = b * s_.length; t < (b + 1) * s_.length; ++t)
        if (!in_.mask || in_.mask[t]) token_.push_back(t);
      start_[b - begin + 1] = static_cast<int64_t>(token_.size());
    }
    for (int64_t m = 0; m < s_.modalities; ++m) {
      complete_[m] = tokens() == samples_ * s_.length;
      for (int64_t b = begin; b < end; ++b) complete_[m] = complete_[m] && available(b, m);
      if constexpr (std::is_same_v<T, A>) {
        if (complete_[m]) {
          x_[m] = in_.x[m] + begin * s_.length * s_.features;
          continue;
        }
      }
      x_[m] = pack(m);
    }
  }

  // h [tokens, (M-1)·q]: the projection of every modality that is the left member of a pair, divided by s_b.
  void project() {
    for (int64_t m = 0; m + 1 < s_.modalities; ++m)
      multiply(h().columns(m * s_.rows, s_.rows), x(m), weight().transposed());
    for (int64_t m = 0; m + 1 < s_.modalities; ++m)
      for (int64_t i = 0; i < s_.rows; ++i)
        sums_[m * s_.rows + i] = s_.augment ? in_.row_weight[i * s_.width + s_.features] : A(0);
    for (int64_t b = 0; b < samples_; ++b)
      for (int64_t t = start_[b]; t < start_[b + 1]; ++t) add_and_scale(h().row(t), sums_, scale(b), left());
  }

  void forward(int64_t b, T* fused, T* pairs) {
    find_present(b);
    A *pair_mean = means_, *fused_mean = means_ + s_.pairs * s_.rows;
    each_rows(b, [&](const Rows<A>& rows, int64_t begin, int64_t end) {
      const Rows<const A> in{rows.data, rows.offset, rows.stride, rows.width, rows.present};
      const auto run = [&](auto kernel) {
        kernel(in, in_.mix, in_.row_bias, local_, pair_mean, fused_mean, s_.rows, begin, end);
      };
      if (s_.activation == Activation::kRelu) run(forward_rows<Activation::kRelu, A>);
      if (s_.activation == Activation::kGelu) run(forward_rows<Activation::kGelu, A>);
      if (s_.activation == Activation::kIdentity) run(forward_rows<Activation::kIdentity, A>);
    });
    convert(pair_mean, pairs + (first_ + b) * s_.pairs * s_.rows, s_.pairs * s_.rows);
    convert(fused_mean, fused + (first_ + b) * s_.channels * s_.rows, s_.channels * s_.rows);
  }

  // Gradients of the features of all samples of the chunk; adds to those of the parameters (row_weight: [q, k']).
  void backward(const T* grad_fused, const T* grad_pairs, const std::vector<T*>& grad_x, A* grad_weight,
                const SmallGrads& sums) {
    std::vector<Block<A>> dx;
    for (int64_t m = 0; m < s_.modalities; ++m)
      dx.push_back({grad_target(m, grad_x), tokens(), s_.features, s_.features});
    if (!dh_) dh_ = scratch_.take<A>(static_cast<int64_t>(start_.size() - 1) * s_.length * left());
    const Block<A> dh{dh_, tokens(), left(), left()};
    for (int64_t b = 0; b < samples_; ++b) sample_backward(b, grad_fused, grad_pairs, dx, dh, sums);
    for (int64_t m = 0; m + 1 < s_.modalities && tokens() > 0; ++m) {
      const Block<A> dh_m = dh.columns(m * s_.rows, s_.rows);
      multiply(dx[m], constant(dh_m), weight(), m > 0);
      multiply(Block<A>{grad_weight, s_.rows, s_.features, s_.width}, constant(dh_m.transposed()), x(m), true);
      if (!s_.augment) continue;
      std::fill_n(sums_, s_.rows, A(0));
      add_rows(sums_, dh_m);
      for (int64_t i = 0; i < s_.rows; ++i) grad_weight[i * s_.width + s_.features] += sums_[i];
    }
    for (int64_t m = 0; m < s_.modalities; ++m) store_grad(m, dx[m], grad_x[m]);
  }

 private:
  static int64_t slot(int64_t m, int64_t n) {
    return n * (n - 1) / 2 + m;
  }  // pairs with the same right member are neighbours
  int64_t left() const { return (s_.modalities - 1) * s_.rows; }
  bool available(int64_t b, int64_t m) const { return !in_.available || in_.available[b * s_.modalities + m]; }
  int64_t count(int64_t b) const { return start_[b + 1] - start_[b]; }
  A scale(int64_t b) const { return A(1) / static_cast<A>(std::max<int64_t>(1, count(b))); }
  Block<A> h() const { return {h_, tokens(), left(), left()}; }
  Block<const A> x(int64_t m) const { return {x_[m], tokens(), s_.features, s_.features}; }
  Block<const A> weight() const { return {in_.row_weight, s_.rows, s_.features, s_.width}; }
  Block<A> pair_rows(int64_t n) const {
    return {rows_ + slot(0, n) * s_.rows * stride_, n * s_.rows, s_.features, stride_};
  }

  A* packed(int64_t m) {
    if (!packed_[m]) packed_[m] = scratch_.take<A>(static_cast<int64_t>(start_.size() - 1) * s_.length * s_.features);
    return packed_[m];
  }

  const A* pack(int64_t m) {
    A* to = packed(m);
    for (size_t t = 0; t < token_.size(); ++t, to += s_.features) {
      if (available(token_[t] / s_.length, m))
        convert(in_.x[m] + token_[t] * s_.features, to, s_.features);
      else
        std::fill_n(to, s_.features, A(0));
    }
    return packed(m);
  }

  void find_present(int64_t b) {
    for (int64_t m = 0; m < s_.modalities; ++m)
      for (int64_t n = m + 1; n < s_.modalities; ++n)
        present_[pair_index(m, n, s_.modalities)] =
            s_.augment || (available(first_ + b, m) && available(first_ + b, n));
  }

  // Calls body(rows, begin, end) with the pre-activations of sample b, all rows at once or, for L = 1, one by one.
  template <typename Body>
  void each_rows(int64_t b, Body&& body) {
    Rows<A> rows{rows_, offset_.data(), stride_, s_.width, present_.get()};
    if (s_.length == 1) {
      rows.stride = 0;
      for (int64_t i = 0; i < s_.rows; ++i) {
        each_pair([&](int64_t m, int64_t n) {
          A* row = rows_ + slot(m, n) * stride_;
          if (count(b))
            outer_row(row, h().row(start_[b])[m * s_.rows + i], x(n).row(start_[b]), s_.features, s_.augment);
          else
            std::fill_n(row, s_.width, A(0));
        });
        body(rows, i, i + 1);
      }
      return;
    }
    const Block<A> h_b = h().rows_from(start_[b], count(b));
    std::fill_n(sums_, left(), A(0));
    add_rows(sums_, h_b);
    for (int64_t n = 1; n < s_.modalities; ++n) {
      const Block<A> out = pair_rows(n);
      if (count(b)) multiply(out, constant(h_b.columns(0, out.rows).transposed()), x(n).rows_from(start_[b], count(b)));
      for (int64_t i = 0; i < out.rows; ++i) {
        if (!count(b)) std::fill_n(out.row(i), s_.features, A(0));
        if (s_.augment) out.row(i)[s_.features] = sums_[i];
      }
    }
    body(rows, 0, s_.rows);
  }

  template <typename Body>
  void each_pair(Body&& body) const {
    for (int64_t m = 0; m < s_.modalities; ++m)
      for (int64_t n = m + 1; n < s_.modalities; ++n) body(m, n);
  }

  void sample_backward(int64_t b, const T* grad_fused, const T* grad_pairs, const std::vector<Block<A>>& dx,
                       const Block<A>& dh, const SmallGrads& sums) {
    find_present(b);
    A *grad_pair_mean = means_, *grad_fused_mean = means_ + s_.pairs * s_.rows;
    convert(grad_pairs + (first_ + b) * s_.pairs * s_.rows, grad_pair_mean, s_.pairs * s_.rows);
    convert(grad_fused + (first_ + b) * s_.channels * s_.rows, grad_fused_mean, s_.channels * s_.rows);
    const int64_t n_tokens = count(b), t0 = start_[b];
    if (s_.length == 1 && n_tokens) {
      std::fill_n(dh.row(t0), left(), A(0));
      for (int64_t n = 1; n < s_.modalities; ++n) std::fill_n(dx[n].row(t0), s_.features, A(0));
    }
    each_rows(b, [&](const Rows<A>& rows, int64_t begin, int64_t end) {
      const auto run = [&](auto kernel) {
        kernel(rows, in_.mix, in_.row_bias, local_, grad_pair_mean, grad_fused_mean, s_.rows, sums, begin, end);
      };
      if (s_.activation == Activation::kRelu) run(backward_rows<Activation::kRelu, A>);
      if (s_.activation == Activation::kGelu) run(backward_rows<Activation::kGelu, A>);
      if (s_.activation == Activation::kIdentity) run(backward_rows<Activation::kIdentity, A>);
      if (s_.length == 1 && n_tokens)
        each_pair([&](int64_t m, int64_t n) {
          const int64_t at = m * s_.rows + begin;
          dh.row(t0)[at] += outer_row_backward(rows_ + slot(m, n) * stride_, h().row(t0)[at], x(n).row(t0),
                                               dx[n].row(t0), s_.features, s_.augment);
        });
    });
    if (s_.length == 1 || n_tokens == 0) return;
    const Block<A> h_b = h().rows_from(t0, n_tokens), dh_b = dh.rows_from(t0, n_tokens);
    std::fill_n(sums_, left(), A(0));
    for (int64_t n = s_.modalities - 1; n > 0; --n) {
      const Block<A> grad = pair_rows(n);
      multiply(dh_b.columns(0, grad.rows), x(n).rows_from(t0, n_tokens), constant(grad.transposed()),
               n + 1 < s_.modalities);
      multiply(dx[n].rows_from(t0, n_tokens), constant(h_b.columns(0, grad.rows)), constant(grad));
      for (int64_t i = 0; i < grad.rows && s_.augment; ++i) sums_[i] += grad.row(i)[s_.features];
    }
    for (int64_t t = 0; t < n_tokens; ++t) add_and_scale(dh_b.row(t), sums_, scale(b), left());
  }

  A* grad_target(int64_t m, const std::vector<T*>& grad_x) {
    if constexpr (std::is_same_v<T, A>)
      if (complete_[m]) return grad_x[m] + first_ * s_.length * s_.features;
    if (grad_packed_.empty()) grad_packed_.assign(s_.modalities, nullptr);
    if (!grad_packed_[m])
      grad_packed_[m] = scratch_.take<A>(static_cast<int64_t>(start_.size() - 1) * s_.length * s_.features);
    return grad_packed_[m];
  }

  void store_grad(int64_t m, const Block<A>& dx, T* grad) {
    if (std::is_same_v<T, A> && complete_[m]) return;
    std::fill_n(grad + first_ * s_.length * s_.features, samples_ * s_.length * s_.features, T(0));
    for (size_t t = 0; t < token_.size(); ++t)
      if (available(token_[t] / s_.length, m)) convert(dx.row(t), grad + token_[t] * s_.features, s_.features);
  }

  const Operands<T>& in_;
  const Sizes& s_;
  int64_t first_ = 0, samples_ = 0, stride_;
  std::vector<int64_t> start_, token_;  // first packed token of a sample; index of a packed token in [B·L]
  std::vector<const A*> x_;
  std::vector<A*> packed_, grad_packed_;
  std::vector<char> complete_;  // nothing of this modality is hidden in the chunk
  std::vector<int64_t> offset_;
  std::unique_ptr<bool[]> present_;
  Scratch scratch_;
  A *rows_, *h_, *dh_ = nullptr, *local_, *sums_, *means_;
};

}  // namespace msacore::matrix_fusion::cpu
