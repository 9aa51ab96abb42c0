// Contrastive terms with so few rows that each term is one tile. The tiles of exponentials are kept from the forward
// pass for the backward pass, which then computes no similarity again. For two-sided terms with diagonal positives and
// bounded exponents; results do not depend on the number of threads.
#pragma once
#include <vector>

#include "contrastive/cpu/sweep.h"
#include "core/round.h"

namespace msacore::contrastive::cpu {

// e[i][j] ← 2^(s·scale - scale), zero where a row or column takes no part; adds to the sums of rows and columns.
template <typename A>
MSACORE_SIMD void exponentials_of(const Tile<A>& t, A* __restrict__ exponentials, double* __restrict__ sum_a,
                                  double* __restrict__ sum_b) {
  A columns[kBlock] = {};
  for (int64_t i = 0; i < t.m; ++i) {
    const A* __restrict__ s = t.s + i * kTileRow;
    A* __restrict__ out = exponentials + i * t.n;
    if (!takes_part(t.exponent_bias_a[i])) {
      for (int64_t j = 0; j < t.n; ++j) out[j] = 0;
      continue;
    }
    const A scale = t.scale;
    const A* __restrict__ from = t.exponent_bias_b;
    A row = 0;
#pragma omp simd reduction(+ : row)
    for (int64_t j = 0; j < t.n; ++j) {
      const A e = exp2_of(s[j] * scale + from[j]);
      out[j] = e;
      row += e;
    }
    sum_a[i] += row;
    for (int64_t j = 0; j < t.n; ++j) columns[j] += out[j];
  }
  for (int64_t j = 0; j < t.n; ++j) sum_b[j] += columns[j];
}

// s[i][j] ← e[i][j] (softmax_weight_a[i] + softmax_weight_b[j]), from exponentials to gradients of the log-sum-exps.
template <typename A>
MSACORE_SIMD void weigh_exponentials(const Tile<A>& t, const A* __restrict__ exponentials,
                                     const A* __restrict__ softmax_weight_a, const A* __restrict__ softmax_weight_b) {
  for (int64_t i = 0; i < t.m; ++i) {
    A* __restrict__ s = t.s + i * kTileRow;
    const A* __restrict__ e = exponentials + i * t.n;
    const A softmax_weight = softmax_weight_a[i];
    for (int64_t j = 0; j < t.n; ++j) s[j] = e[j] * (softmax_weight + softmax_weight_b[j]);
  }
}

// How many exponentials a term keeps.
template <typename A>
int64_t exponential_count(const Term<A>& term) {
  return term.a->rows * term.b->rows;
}

// The tile of a term, at `s`.
template <typename A>
Tile<A> few_tile(const Term<A>& term, A* s) {
  return {term.a->rows,
          term.b->rows,
          s,
          term.rows.exponent_bias,
          term.columns.exponent_bias,
          static_cast<A>(term.scale),
          0};
}

// How many terms, or blocks of rows of a side, are worth a thread.
template <typename A>
int64_t few_grain(const std::vector<Term<A>>& terms) {
  int64_t most = 1;
  for (const Term<A>& term : terms) most = std::max(most, term.a->rows * term.b->rows * term.a->width);
  return std::max<int64_t>(1, 200000 / most);
}

// Sums of exponentials and positives of every term; then calls then(index) on the same thread. The exponentials [rows
// of a, rows of b] of the terms, one after the other, go to `kept`, unless it is null.
template <typename A, typename Then>
void sum_few_exponentials(std::vector<Term<A>>& terms, A* kept, Then&& then) {
  parallel_for(0, static_cast<int64_t>(terms.size()), few_grain(terms), [&](int64_t begin, int64_t end) {
    const Buffer<A> tile(kBlock * kTileRow), own(kept ? 0 : kBlock * kBlock);
    for (int64_t k = begin; k < end; ++k) {
      Term<A>& term = terms[k];
      open_rows(term.rows, *term.a, term.scale, true);
      open_rows(term.columns, *term.b, term.scale, true);
      init_sums(term.rows, *term.a, true);
      init_sums(term.columns, *term.b, true);
      const Side<A>&a = *term.a, &b = *term.b;
      const Tile<A> t = few_tile(term, tile.get());
      small_product<A>(
          {a.rows, b.rows, a.d, a.row(0), a.stride, 1, b.panels.get(), kPanel * b.width, kPanel, t.s, kTileRow, false});
      for (int64_t i = 0; i < std::min(a.n, b.n); ++i) {
        if (!takes_part(t.exponent_bias_a[i]) || !takes_part(t.exponent_bias_b[i])) continue;
        term.rows.total[i] = term.columns.total[i] = 1;
        term.rows.positive[i] = term.columns.positive[i] = t.s[i * kTileRow + i];
      }
      exponentials_of(t, kept ? kept + k * exponential_count(term) : own.get(), term.rows.sum, term.columns.sum);
      then(k);
    }
  });
}

// Gradients of terms whose weights load_shares has set, from their exponentials.
template <typename A>
class FewGradients {
 public:
  FewGradients(std::vector<Term<A>>& terms, const A* kept) : terms_(terms) {
    int64_t rows = 0;
    for (const Term<A>& term : terms_) rows += term.a->rows;
    tiles_ = Buffer<A>(rows * kTileRow);
    parallel_for(0, count(), few_grain(terms_), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        Term<A>& term = terms_[k];
        open_rows(term.rows, *term.a, term.scale, true);
        open_rows(term.columns, *term.b, term.scale, true);
        const Tile<A> t = few_tile(term, tile(k));
        weigh_exponentials(t, kept + k * exponential_count(term), term.rows.softmax_weight,
                           term.columns.softmax_weight);
        for (int64_t i = 0; i < std::min(term.a->n, term.b->n); ++i)
          if (takes_part(t.exponent_bias_a[i]) && takes_part(t.exponent_bias_b[i]))
            t.s[i * kTileRow + i] -= term.rows.attract[i] + term.columns.attract[i];
      }
    });
  }

  // Gradients of all sides with respect to their embeddings.
  template <typename T>
  void project(const std::vector<Side<A>>& sides, const std::vector<T*>& grads) const {
    constexpr int64_t kRows = 32;
    int64_t blocks = 0;
    for (const Side<A>& side : sides) blocks = std::max(blocks, ceil_div(side.rows, kRows));
    const int64_t all = static_cast<int64_t>(sides.size());
    // Blocks are the outermost index, so that every part of the loop has an equal share of every side.
    parallel_for(0, blocks * all, few_grain(terms_), [&](int64_t begin, int64_t end) {
      Buffer<A> gradient;
      int64_t held = 0;
      double pull[kRows];
      for (int64_t k = begin; k < end; ++k) {
        const Side<A>& side = sides[k % all];
        const int64_t row = k / all * kRows, rows = std::min(kRows, side.rows - row);
        if (rows <= 0) continue;
        if (held < kRows * side.width) gradient = Buffer<A>(held = kRows * side.width);
        gather(side, row, rows, gradient.get());
        side.project_rows(gradient.get(), grads[k % all] + row * side.d, pull, A(1), row,
                          row + std::min(rows, side.n - row));
      }
    });
  }

 private:
  int64_t count() const { return static_cast<int64_t>(terms_.size()); }
  A* tile(int64_t k) const { return tiles_.get() + k * terms_[k].a->rows * kTileRow; }  // all terms are of one size

  // gradient [rows, width] ← Σ over the terms of a side, in their order, of gradients of similarities · other rows.
  void gather(const Side<A>& side, int64_t row, int64_t rows, A* gradient) const {
    bool add = false;
    for (int64_t k = 0; k < count(); ++k) {
      const Term<A>& term = terms_[k];
      const A* s = tile(k);
      if (term.a == &side) {
        small_product<A>({rows, side.width, term.b->rows, s + row * kTileRow, kTileRow, 1, term.b->row(0), kPanel,
                          term.b->stride, gradient, side.width, add});
        add = true;
      }
      if (term.b == &side) {
        small_product<A>({rows, side.width, term.a->rows, s + row, 1, kTileRow, term.a->row(0), kPanel, term.a->stride,
                          gradient, side.width, add});
        add = true;
      }
    }
    if (!add) std::fill(gradient, gradient + rows * side.width, A(0));
  }

  std::vector<Term<A>>& terms_;
  Buffer<A> tiles_;  // one after the other
};

}  // namespace msacore::contrastive::cpu
