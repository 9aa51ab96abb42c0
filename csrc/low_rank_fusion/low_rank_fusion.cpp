// Low-rank fusion on the CPU. Tiles of rows stay in cache: for each rank the projections a_mr = [x_m; 1] factors_m[r]
// and what is computed from them. The backward pass reads the projections again, or computes them where they were not
// kept. Threads share the ranks, and the rows too where there are too few ranks; sums to which several threads
// contribute are completed at the end, in order.
#include "low_rank_fusion/low_rank_fusion.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "low_rank_fusion/low_rank_fusion_rows.h"

namespace msacore::low_rank_fusion::cpu {
using namespace msacore::cpu;
namespace {

static_assert(kRowMultiple == kPanel, "kept projections are panels of the products");

struct Range {
  int64_t begin, end;
};

// The parts of the ranks and of the rows. Each thread takes several, and one whose core is busy takes fewer.
struct Parts {
  int64_t ranks, rows;
  int64_t rank, batch;

  explicit Parts(const Sizes& s) : ranks(1), rows(1), rank(s.rank), batch(s.batch) {
    constexpr int64_t kThreadPays = int64_t{1} << 19, kFewRows = 32;  // multiplications and rows of a part, at least
    constexpr int64_t kPartsOfAThread = 4;
    const int64_t widths = std::accumulate(s.features.begin(), s.features.end(), s.modalities);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t most = std::clamp<int64_t>(batch * rank * s.width * widths / kThreadPays, 1,
                                             threads > 1 ? threads * kPartsOfAThread : 1);
    for (ranks = std::clamp<int64_t>(rank, 1, most); rank % ranks != 0;) --ranks;
    rows = std::clamp<int64_t>(batch / kFewRows, 1, most / ranks);
  }

  // Calls body(rank_part, ranks, row_part, rows) for every part.
  template <typename Body>
  void each(Body&& body) const {
    parallel_for(0, ranks * rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t i = part / rows, j = part % rows;
        body(i, Range{rank * i / ranks, rank * (i + 1) / ranks}, j, Range{batch * j / rows, batch * (j + 1) / rows});
      }
    });
  }
};

// How many members of `size` numbers are worth a thread.
int64_t grain(int64_t size) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, size)); }

// Arguments in their accumulation type: features with their 1 and with zeros where a modality is missing, factors with
// rows padded to whole panels.
template <typename T>
struct Operands {
  using A = acc_t<T>;
  std::vector<Tensor> keep;
  Scratch scratch;
  std::vector<Block<const A>> x;  // [B, d_m + 1]
  std::vector<const A*> factors;  // [r, d_m + 1, width]
  int64_t width;
  bool in_place;  // rows of results are laid out like those of the caller's tensors
  const A *rank_weight, *bias;
  const bool* available = nullptr;

  Operands(const Inputs& in, const Sizes& s)
      : width(padded(s.width)), in_place(std::is_same_v<T, A> && width == s.width) {
    if (in.available) available = own<bool>(contiguous_as(*in.available));
    rank_weight = own<A>(contiguous_as(in.rank_weight, acc_dtype(in.rank_weight.scalar_type())));
    bias = own<A>(contiguous_as(in.bias, acc_dtype(in.bias.scalar_type())));
    for (int64_t m = 0; m < s.modalities; ++m) {
      x.push_back(with_one(own<T>(contiguous_as(in.features[m])), m, s));
      factors.push_back(padded_rows(own<T>(contiguous_as(in.factors[m])), s.rank * (s.features[m] + 1), s.width));
    }
  }
  // Where the projections of rows b … of rank r lie: in `kept` [M, r, B, width] or, where that is null, in `tile`
  // [M, kTileRows, width].
  Tile<A> place(int64_t r, int64_t b, int64_t rows, A* kept, A* tile, const Sizes& s) const {
    if (!kept) return {tile, s.modalities, width, rows, kTileRows * width};
    return {kept + (r * s.batch + b) * width, s.modalities, width, rows, s.rank * s.batch * width};
  }
  bool has(int64_t b, int64_t m, const Sizes& s) const { return !available || available[b * s.modalities + m]; }
  const A* factor(int64_t m, int64_t r) const { return factors[m] + r * x[m].cols * width; }

  void project(int64_t r, int64_t b, const Tile<A>& to) const {
    for (int64_t m = 0; m < to.modalities; ++m) {
      const Block<const A> rows = x[m].rows_from(b, to.rows);
      small_product<A>({rows.rows, width, rows.cols, rows.data, rows.row_stride, 1, factor(m, r), kPanel, width,
                        to.at(m, 0, 0), width, false});
    }
  }

  // Rows [count, columns] with zeros up to the width.
  template <typename Value>
  const A* padded_rows(const Value* rows, int64_t count, int64_t columns) {
    if constexpr (std::is_same_v<Value, A>)
      if (width == columns) return rows;
    A* packed = scratch.take<A>(count * width);
    parallel_for(0, count, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        convert(rows + i * columns, packed + i * width, columns);
        std::fill(packed + i * width + columns, packed + (i + 1) * width, A(0));
      }
    });
    return packed;
  }

 private:
  template <typename Value>
  const Value* own(Tensor t) {
    keep.push_back(std::move(t));
    return keep.back().template const_data_ptr<Value>();
  }
  Block<const A> with_one(const T* feature, int64_t m, const Sizes& s) {
    const int64_t d = s.features[m];
    A* packed = scratch.take<A>(s.batch * (d + 1));
    parallel_for(0, s.batch, grain(d), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        A* row = packed + b * (d + 1);
        if (has(b, m, s))
          convert(feature + b * d, row, d);
        else
          std::fill_n(row, d, A(0));
        row[d] = 1;
      }
    });
    return {packed, s.batch, d + 1, d + 1};
  }
};

// Calls body(begin, rows) for the tiles of a range of rows.
template <typename Body>
void each_tile(const Range& rows, Body&& body) {
  for (int64_t b = rows.begin; b < rows.end; b += kTileRows) body(b, std::min(kTileRows, rows.end - b));
}

// Adds members 1 … of `parts`, which hold `size` numbers each, to member 0, for numbers begin … end.
template <typename A>
void add_parts(A* parts, int64_t count, int64_t size, int64_t begin, int64_t end) {
  for (int64_t i = 1; i < count; ++i) add(parts + i * size + begin, parts + begin, end - begin);
}

template <typename T>
void forward(const Operands<T>& in, const Sizes& s, T* out, acc_t<T>* kept) {
  using A = acc_t<T>;
  const int64_t width = in.width;
  const Parts parts(s);
  Scratch scratch;
  A* sums = scratch.take<A>(parts.ranks * s.batch * width);
  parts.each([&](int64_t i, const Range& ranks, int64_t, const Range& rows) {
    Scratch local;
    A* tile = kept ? nullptr : local.take<A>(s.modalities * kTileRows * width);
    A* sum = sums + i * s.batch * width;
    std::fill(sum + rows.begin * width, sum + rows.end * width, A(0));
    for (int64_t r = ranks.begin; r < ranks.end; ++r)
      each_tile(rows, [&](int64_t b, int64_t count) {
        const Tile<A> a = in.place(r, b, count, kept, tile, s);
        in.project(r, b, a);
        combine(a, in.rank_weight[r], sum + b * width);
      });
  });
  parallel_for(0, s.batch, grain(parts.ranks * width), [&](int64_t begin, int64_t end) {
    add_parts(sums, parts.ranks, s.batch * width, begin * width, end * width);
    for (int64_t b = begin; b < end; ++b) {
      add(in.bias, sums + b * width, s.width);
      convert(sums + b * width, out + b * s.width, s.width);
    }
  });
}

void forward(const char* op, const Inputs& in, const Sizes& s, Tensor& out, Tensor& projections) {
  dispatch_floating(out.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    forward(Operands<T>(in, s), s, out.mutable_data_ptr<T>(), kept_data<acc_t<T>>(on_huge_pages(projections)));
  });
}

template <typename T>
struct Gradients {
  std::vector<T*> features, factors;
  T *rank_weight, *bias;
};

template <typename T>
void backward(Operands<T>& in, const Sizes& s, const T* grad_out_, acc_t<T>* kept, const Gradients<T>& grads) {
  using A = acc_t<T>;
  const int64_t width = in.width;
  const Parts parts(s);
  const A* grad_out = in.padded_rows(grad_out_, s.batch, s.width);

  // For each modality: factors without the row of the 1, transposed; gradients of x, a member per part of the ranks,
  // and of the factors, a member per part of the rows.
  Scratch scratch;
  std::vector<A*> transposed, grad_x, grad_factors;
  const bool in_place = in.in_place && parts.rows == 1;
  for (int64_t m = 0; m < s.modalities; ++m) {
    const int64_t d = s.features[m];
    A* panels = scratch.take<A>(s.rank * padded(d) * s.width);
    parallel_for(0, s.rank, grain(d * s.width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        transpose_panels(in.factor(m, r), d, width, s.width, panels + r * padded(d) * s.width);
    });
    transposed.push_back(panels);
    grad_x.push_back(scratch.take<A>(parts.ranks * s.batch * padded(d)));
    if constexpr (std::is_same_v<T, A>)
      if (in_place) grad_factors.push_back(grads.factors[m]);
    if (!in_place) grad_factors.push_back(scratch.take<A>(parts.rows * s.rank * (d + 1) * width));
  }
  double* grad_weights = scratch.take<double>(parts.rows * s.rank);

  parts.each([&](int64_t i, const Range& ranks, int64_t j, const Range& rows) {
    Scratch local;
    A* grad_a = local.take<A>(s.modalities * kTileRows * width);
    A* tile = kept ? nullptr : local.take<A>(s.modalities * kTileRows * width);
    std::fill(grad_weights + j * s.rank + ranks.begin, grad_weights + j * s.rank + ranks.end, 0.0);
    for (int64_t m = 0; m < s.modalities; ++m) {
      const int64_t columns = padded(s.features[m]), size = in.x[m].cols * width;
      if (ranks.begin == ranks.end)
        std::fill_n(grad_x[m] + (i * s.batch + rows.begin) * columns, (rows.end - rows.begin) * columns, A(0));
      if (rows.begin == rows.end)
        std::fill_n(grad_factors[m] + (j * s.rank + ranks.begin) * size, (ranks.end - ranks.begin) * size, A(0));
    }
    for (int64_t r = ranks.begin; r < ranks.end; ++r)
      each_tile(rows, [&](int64_t b, int64_t count) {
        const Tile<A> a = in.place(r, b, count, kept, tile, s);
        if (!kept) in.project(r, b, a);
        grad_weights[j * s.rank + r] += combine_backward(a, in.rank_weight[r], grad_out + b * width, grad_a);
        for (int64_t m = 0; m < s.modalities; ++m) {
          const Block<const A> x = in.x[m].rows_from(b, count);
          const int64_t columns = padded(s.features[m]);
          const A* grad = grad_a + m * kTileRows * width;
          small_product<A>({x.cols, width, count, x.data, 1, x.row_stride, grad, kPanel, width,
                            grad_factors[m] + (j * s.rank + r) * x.cols * width, width, b > rows.begin});
          small_product<A>({count, columns, s.width, grad, width, 1, transposed[m] + r * columns * s.width,
                            kPanel * s.width, kPanel, grad_x[m] + (i * s.batch + b) * columns, columns,
                            r > ranks.begin});
        }
      });
  });

  for (int64_t m = 0; m < s.modalities; ++m) {
    const int64_t d = s.features[m], columns = padded(d), size = (d + 1) * width;
    parallel_for(0, s.batch, grain(parts.ranks * columns), [&](int64_t begin, int64_t end) {
      add_parts(grad_x[m], parts.ranks, s.batch * columns, begin * columns, end * columns);
      for (int64_t b = begin; b < end; ++b) {
        if (in.has(b, m, s))
          convert(grad_x[m] + b * columns, grads.features[m] + b * d, d);
        else
          std::fill_n(grads.features[m] + b * d, d, T(0));
      }
    });
    if (in_place) continue;
    parallel_for(0, s.rank, grain(parts.rows * size), [&](int64_t begin, int64_t end) {
      add_parts(grad_factors[m], parts.rows, s.rank * size, begin * size, end * size);
      for (int64_t row = begin * (d + 1); row < end * (d + 1); ++row)
        convert(grad_factors[m] + row * width, grads.factors[m] + row * s.width, s.width);
    });
  }
  add_parts(grad_weights, parts.rows, s.rank, 0, s.rank);
  convert(grad_weights, grads.rank_weight, s.rank);
  double* sums = scratch.take<double>(width);
  column_sums(grad_out, s.batch, width, sums);
  convert(sums, grads.bias, s.width);
}

void backward(const char* op, const Inputs& in, const Sizes& s, const Tensor& grad_out_, const Tensor& projections,
              GradTensors& results) {
  const Tensor grad_out = contiguous_as(grad_out_);
  dispatch_floating(grad_out.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Gradients<T> grads{{}, {}, results.rank_weight.mutable_data_ptr<T>(), results.bias.mutable_data_ptr<T>()};
    for (int64_t m = 0; m < s.modalities; ++m) {
      grads.features.push_back(results.features[m].mutable_data_ptr<T>());
      grads.factors.push_back(results.factors[m].mutable_data_ptr<T>());
    }
    Operands<T> operands(in, s);
    backward(operands, s, grad_out.const_data_ptr<T>(), kept_data<acc_t<T>>(projections), grads);
  });
}

using Operators = LowRankOperators<forward, backward>;

}  // namespace
}  // namespace msacore::low_rank_fusion::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(msacore, m) {
  m.def(
      "low_rank_fusion(Tensor[] features, Tensor[] factors, Tensor rank_weight, Tensor bias, Tensor? available, *, "
      "bool "
      "keep) -> (Tensor, Tensor)");
  m.def(
      "low_rank_fusion_backward(Tensor grad_out, Tensor projections, Tensor[] features, Tensor[] factors, Tensor "
      "rank_weight, Tensor bias, Tensor? available) -> (Tensor[], Tensor[], Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(msacore, CPU, m) {
  m.impl("low_rank_fusion", TORCH_BOX(&msacore::low_rank_fusion::cpu::Operators::low_rank_fusion));
  m.impl("low_rank_fusion_backward", TORCH_BOX(&msacore::low_rank_fusion::cpu::Operators::low_rank_fusion_backward));
}
