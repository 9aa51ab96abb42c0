// Matrix products on blocks of memory inside CPU kernels: through torch (oneMKL on x86) where the product is large
// enough to pay for the call, and in registers where it is smaller.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "core/check.h"
#include "core/round.h"
#include "cpu/microkernel.h"
#include "cpu/simd.h"

namespace msacore::cpu {

// A matrix in memory that it does not own.
template <typename A>
struct Block {
  A* data;
  int64_t rows, cols, row_stride, col_stride = 1;

  A* row(int64_t i) const { return data + i * row_stride; }
  Block transposed() const { return {data, cols, rows, col_stride, row_stride}; }
  Block columns(int64_t begin, int64_t count) const {
    return {data + begin * col_stride, rows, count, row_stride, col_stride};
  }
  Block rows_from(int64_t begin, int64_t count) const { return {row(begin), count, cols, row_stride, col_stride}; }
};

template <typename A>
Block<const A> constant(const Block<A>& b) {
  return {b.data, b.rows, b.cols, b.row_stride, b.col_stride};
}

// `t` in the given dtype with contiguous memory; `t` itself where it already is, because a dispatcher call costs more
// than the smallest products.
inline Tensor contiguous_as(const Tensor& t, ScalarType dtype) {
  const Tensor same = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}

inline Tensor contiguous_as(const Tensor& t) { return contiguous_as(t, t.scalar_type()); }

// Memory for the intermediate results of one thread, aligned for vector loads, uninitialised, freed all at once.
class Scratch {
 public:
  template <typename A>
  A* take(int64_t count) {
    constexpr size_t kAlignment = 64;
    const size_t bytes = round_up(std::max<int64_t>(count, 1) * sizeof(A), kAlignment);
    memory_.emplace_back(std::aligned_alloc(kAlignment, bytes), &std::free);
    if (!memory_.back()) throw std::bad_alloc();
    return static_cast<A*>(memory_.back().get());
  }

 private:
  std::vector<std::unique_ptr<void, decltype(&std::free)>> memory_;
};

// to[j] = from[j], between a storage type and its accumulation type.
template <typename From, typename To>
MSACORE_SIMD void convert(const From* __restrict__ from, To* __restrict__ to, int64_t count) {
  for (int64_t j = 0; j < count; ++j) to[j] = static_cast<To>(from[j]);
}

// out (+)= a · b where the rows of `out` and `b` are contiguous.
template <typename A>
MSACORE_SIMD void multiply_by_rows(const Block<A>& out, const Block<const A>& a, const Block<const A>& b,
                                   bool accumulate) {
  for (int64_t i = 0; i < out.rows; ++i) {
    A* __restrict__ o = out.row(i);
    if (!accumulate)
      for (int64_t j = 0; j < out.cols; ++j) o[j] = 0;
    for (int64_t l = 0; l < a.cols; ++l) {
      const A factor = a.data[i * a.row_stride + l * a.col_stride];
      const A* __restrict__ source = b.row(l);
      for (int64_t j = 0; j < out.cols; ++j) o[j] += factor * source[j];
    }
  }
}

// out (+)= a · b where the rows of `a` and the columns of `b` are contiguous.
template <typename A>
MSACORE_SIMD void multiply_by_dots(const Block<A>& out, const Block<const A>& a, const Block<const A>& b,
                                   bool accumulate) {
  for (int64_t i = 0; i < out.rows; ++i)
    for (int64_t j = 0; j < out.cols; ++j) {
      const A* __restrict__ left = a.row(i);
      const A* __restrict__ right = b.data + j * b.col_stride;
      A dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t l = 0; l < a.cols; ++l) dot += left[l] * right[l];
      A& target = out.data[i * out.row_stride + j];
      target = accumulate ? target + dot : dot;
    }
}

template <typename A>
Tensor as_tensor(const Block<A>& block) {
  using Value = std::remove_const_t<A>;
  const std::array<int64_t, 2> sizes{block.rows, block.cols}, strides{block.row_stride, block.col_stride};
  return torch::stable::from_blob(const_cast<Value*>(block.data), {sizes.data(), 2}, {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  sizeof(Value) == 8 ? ScalarType::Double : ScalarType::Float);
}

// out (+)= a · b. `out` has contiguous rows; `b` has contiguous rows, or `a` contiguous rows and `b` contiguous
// columns. Runs on the calling thread when that is a worker of parallel_for. The C functions of torch go straight to
// the CPU kernel: no dispatcher, so neither autocast nor the modes of the caller's thread are involved.
template <typename A>
void multiply(const Block<A>& out, const Block<const A>& a, const Block<const A>& b, bool accumulate = false) {
  // Below this many multiplications the call costs more than the product (measured: about 3 µs with its three views).
  constexpr int64_t kCallPays = 16384;
  if (out.rows * out.cols * a.cols >= kCallPays) {
    Tensor result = as_tensor(out);
    const Tensor left = as_tensor(a), right = as_tensor(b);
    TORCH_ERROR_CODE_CHECK(accumulate
                               ? aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), 1, 1)
                               : aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
  } else if (b.col_stride == 1) {
    const int64_t whole = out.cols / kPanel * kPanel, rest = out.cols - whole;
    if (whole)
      small_product<A>({out.rows, whole, a.cols, a.data, a.row_stride, a.col_stride, b.data, kPanel, b.row_stride,
                        out.data, out.row_stride, accumulate});
    if (rest) multiply_by_rows(out.columns(whole, rest), a, b.columns(whole, rest), accumulate);
  } else {
    multiply_by_dots(out, a, b, accumulate);
  }
}

}  // namespace msacore::cpu
