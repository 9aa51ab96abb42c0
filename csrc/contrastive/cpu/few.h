// Contrastive terms of so few rows that a term is one tile: it stays in the cache from the similarities to the
// gradients, and loss and gradient come from one visit. For two-sided terms with diagonal positives and bounded
// exponents; results do not depend on the number of threads.
#pragma once
#include <vector>

#include "contrastive/cpu/sweep.h"

namespace msacore::contrastive::cpu {

template <typename A>
bool are_few(const std::vector<Term<A>>& terms) {
  return std::all_of(terms.begin(), terms.end(), [](const Term<A>& term) {
    return !term.self() && term.both && term.diagonal && term.bounded() && term.a->rows <= kBlock &&
           term.b->rows <= kBlock;
  });
}

// s ← 2^(s·scale - scale), zero where a row or column takes no part; adds to the sums of rows and columns.
template <typename A>
MSACORE_SIMD void exponentials_in_place(const Tile<A>& t, double* __restrict__ sum_a, double* __restrict__ sum_b) {
  A columns[kBlock] = {};
  for (int64_t i = 0; i < t.m; ++i) {
    A* __restrict__ s = t.s + i * kTileRow;
    if (!takes_part(t.from_a[i])) {
      for (int64_t j = 0; j < t.n; ++j) s[j] = 0;
      continue;
    }
    const A scale = t.scale;
    const A* __restrict__ from = t.from_b;
    A row = 0;
#pragma omp simd reduction(+ : row)
    for (int64_t j = 0; j < t.n; ++j) {
      const A e = exp2_of(s[j] * scale + from[j]);
      s[j] = e;
      row += e;
    }
    sum_a[i] += row;
    for (int64_t j = 0; j < t.n; ++j) columns[j] += s[j];
  }
  for (int64_t j = 0; j < t.n; ++j) sum_b[j] += columns[j];
}

// s[i][j] ← s[i][j] (share_a[i] + share_b[j]), from exponentials to gradients of the log-sum-exps.
template <typename A>
MSACORE_SIMD void weigh_exponentials(const Tile<A>& t, const A* __restrict__ share_a, const A* __restrict__ share_b) {
  for (int64_t i = 0; i < t.m; ++i) {
    A* __restrict__ s = t.s + i * kTileRow;
    const A share = share_a[i];
    for (int64_t j = 0; j < t.n; ++j) s[j] *= share + share_b[j];
  }
}

// One tile per term, and what visits them.
template <typename A>
class FewTerms {
 public:
  explicit FewTerms(std::vector<Term<A>>& terms) : terms_(terms) {
    for (Term<A>& term : terms_) tiles_.emplace_back(term.a->rows * kTileRow);
  }

  // Sums of exponentials and positives of every term, then then(index) on the same thread.
  template <typename Then>
  void sum_exponentials(Then&& then) {
    torch::stable::parallel_for(0, count(), grain(), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        Term<A>& term = terms_[k];
        open_rows(term.rows, *term.a, term.scale, true);
        open_rows(term.columns, *term.b, term.scale, true);
        start_sums(term.rows, *term.a, true);
        start_sums(term.columns, *term.b, true);
        const Side<A>&a = *term.a, &b = *term.b;
        const Tile<A> t = tile(k);
        small_product<A>({a.rows, b.rows, a.d, a.row(0), a.stride, 1, b.panels.get(), kPanel * b.width, kPanel, t.s,
                          kTileRow, false});
        for (int64_t i = 0; i < std::min(a.n, b.n); ++i) {
          if (!takes_part(t.from_a[i]) || !takes_part(t.from_b[i])) continue;
          term.rows.total[i] = term.columns.total[i] = 1;
          term.rows.positive[i] = term.columns.positive[i] = t.s[i * kTileRow + i];
        }
        exponentials_in_place(t, term.rows.sum.get(), term.columns.sum.get());
        then(k);
      }
    });
  }

  // Turns the exponentials of a term, whose shares are loaded, into gradients of its similarities.
  void weigh(int64_t k) {
    const Term<A>& term = terms_[k];
    const Tile<A> t = tile(k);
    weigh_exponentials(t, term.rows.share.get(), term.columns.share.get());
    for (int64_t i = 0; i < std::min(term.a->n, term.b->n); ++i)
      if (takes_part(t.from_a[i]) && takes_part(t.from_b[i]))
        t.s[i * kTileRow + i] -= term.rows.attract[i] + term.columns.attract[i];
  }

  // Gradients of all sides with respect to their embeddings, once every term is weighed.
  template <typename T>
  void project(const std::vector<Side<A>>& sides, const std::vector<T*>& grads) const {
    constexpr int64_t kRows = 32;
    int64_t blocks = 0;
    for (const Side<A>& side : sides) blocks = std::max(blocks, (side.rows + kRows - 1) / kRows);
    const int64_t all = static_cast<int64_t>(sides.size());
    // Blocks outermost: equal shares of every side for every thread.
    torch::stable::parallel_for(0, blocks * all, grain(), [&](int64_t begin, int64_t end) {
      Buffer<A> gradient;
      int64_t held = 0;
      double pull[kRows];
      for (int64_t k = begin; k < end; ++k) {
        const Side<A>& side = sides[k % all];
        const int64_t row = k / all * kRows, rows = std::min(kRows, side.rows - row);
        if (rows <= 0) continue;
        if (held < kRows * side.width) gradient = Buffer<A>(held = kRows * side.width);
        gather(side, row, rows, gradient.get());
        project_rows(gradient.get(), side.row(row), side.inverse_norm.get() + row, grads[k % all] + row * side.d, pull,
                     A(1), side.d, side.width, side.stride, 0, std::min(rows, side.n - row));
      }
    });
  }

 private:
  int64_t count() const { return static_cast<int64_t>(terms_.size()); }

  // How many terms, or blocks of rows of a side, are worth a thread.
  int64_t grain() const {
    int64_t most = 1;
    for (const Term<A>& term : terms_) most = std::max(most, term.a->rows * term.b->rows * term.a->width);
    return std::max<int64_t>(1, 200000 / most);
  }

  Tile<A> tile(int64_t k) const {
    const Term<A>& term = terms_[k];
    return {term.a->rows,
            term.b->rows,
            tiles_[k].get(),
            term.rows.from.get(),
            term.columns.from.get(),
            static_cast<A>(term.scale),
            0};
  }

  // gradient [rows, width] ← Σ over the terms of a side, in their order, of gradients of similarities · other rows.
  void gather(const Side<A>& side, int64_t row, int64_t rows, A* gradient) const {
    bool add = false;
    for (int64_t k = 0; k < count(); ++k) {
      const Term<A>& term = terms_[k];
      const A* s = tiles_[k].get();
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
  std::vector<Buffer<A>> tiles_;
};

}  // namespace msacore::contrastive::cpu
