// The two sweeps of contrastive losses over their tiles: sums of exponentials forward, gradients of unit rows backward.
// A loss is a list of terms between sides (embeddings); all terms share the sides and one schedule.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "contrastive/cpu/schedule.h"
#include "contrastive/cpu/side.h"
#include "core/round.h"

namespace msacore::contrastive::cpu {

// s [m, kTileRow] ← similarities of rows i … of a with rows j … of b.
template <typename A>
void similarities(const Side<A>& a, const Side<A>& b, int64_t i, int64_t j, int64_t m, int64_t n, A* s) {
  if constexpr (std::is_same_v<A, float>)
    if (a.pairs) return PairRows::similarities(a.pairs, b.pairs, i, j, m, n, s);
  small_product<A>(
      {m, n, a.d, a.row(i), a.stride, 1, b.panels.get() + j * b.width, kPanel * b.width, kPanel, s, kTileRow, false});
}

// Copies similarities between a tile and the memory that keeps them, in either direction.
template <typename A>
void copy_tile(const A* from, int64_t from_stride, A* to, int64_t to_stride, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, n * sizeof(A));
}

// s [m, kTileRow] ← similarities of a tile of a term, computed unless an earlier sweep has kept them.
template <typename A>
void tile_similarities(const Term<A>& term, int64_t i, int64_t j, int64_t m, int64_t n, A* s) {
  const int64_t stride = term.b->rows;
  A* const kept = term.kept ? term.kept + i * stride + j : nullptr;
  if (term.known) return copy_tile(kept, stride, s, kTileRow, m, n);
  similarities(*term.a, *term.b, i, j, m, n, s);
  if (kept) copy_tile(s, kTileRow, kept, stride, m, n);
}

// Adds what the gradients of the tile give to the gradient of a and, with `both`, to that of b.
template <typename A>
void add_tile_gradients(const Side<A>& a, const Side<A>& b, int64_t i, int64_t j, const Tile<A>& tile, bool both) {
  A *const to_a = a.gradient.get() + i * a.width, *const to_b = both ? b.gradient.get() + j * b.width : nullptr;
  if constexpr (std::is_same_v<A, float>)
    if (a.pairs) return PairRows::add_gradients(a.pairs, b.pairs, i, j, tile.m, tile.n, tile.s, to_a, to_b);
  small_product<A>({tile.m, a.width, tile.n, tile.s, kTileRow, 1, b.row(j), kPanel, b.stride, to_a, a.width, true});
  if (to_b)
    small_product<A>({tile.n, b.width, tile.m, tile.s, 1, kTileRow, a.row(i), kPanel, a.stride, to_b, b.width, true});
}

// Calls work(term, tile, row offset, column offset) for every tile, with the similarities computed.
template <typename A, typename Work>
void sweep(const std::vector<Term<A>>& terms, Work&& work) {
  const int64_t block = block_size(terms);
  Steps<A> steps(terms, block);
  torch::stable::parallel_for(0, steps.workers(), 1, [&](int64_t, int64_t) {
    const Buffer<A> scratch(block * kTileRow);
    steps.run([&](const TileIndex& index) {
      const Term<A>& term = terms[index.term];
      const Side<A>&a = *term.a, &b = *term.b;
      const int64_t i = index.row * block, j = index.column * block;
      const int64_t m = std::min(block, a.rows - i), n = std::min(block, b.rows - j);
      tile_similarities(term, i, j, m, n, scratch.get());
      const Tile<A> tile{m,
                         n,
                         scratch.get(),
                         term.rows.exponent_bias + i,
                         term.other().exponent_bias + j,
                         static_cast<A>(term.scale),
                         i - j + term.offset};
      work(term, tile, i, j);
    });
  });
}

// Sets what is added to the exponents of rows, where all are bounded (-scale), or else to their similarities (0); -inf
// for rows that take no part.
template <typename A>
void open_rows(Direction<A>& direction, const Side<A>& side, double scale, bool bounded) {
  std::fill_n(direction.exponent_bias, side.rows, -std::numeric_limits<A>::infinity());
  for (int64_t i = 0; i < side.n; ++i)
    if (direction.used[i]) direction.exponent_bias[i] = bounded ? -static_cast<A>(scale) : A(0);
}

template <typename A>
void init_sums(Direction<A>& direction, const Side<A>& side, bool bounded) {
  if (!bounded) std::fill_n(direction.highest, side.rows, -std::numeric_limits<A>::infinity());
  for (double* sums : {direction.sum, direction.total, direction.positive}) std::fill_n(sums, side.rows, 0.0);
}

// First sweep: sums of exponentials, and the positives of diagonal terms. `inspect` sees the plain similarities first;
// `hide` may then set to -inf those that no denominator holds.
template <typename A, typename Inspect, typename Hide>
void sum_exponentials(std::vector<Term<A>>& terms, Inspect&& inspect, Hide&& hide) {
  for (Term<A>& term : terms) {
    open_rows(term.rows, *term.a, term.scale, term.bounded());
    init_sums(term.rows, *term.a, term.bounded());
    if (term.self()) continue;
    open_rows(term.columns, *term.b, term.scale, term.bounded());
    init_sums(term.columns, *term.b, term.bounded());
  }
  sweep(terms, [&](const Term<A>& term, const Tile<A>& tile, int64_t row, int64_t column) {
    inspect(term, tile, row, column);
    if (term.diagonal)
      for (int64_t i = 0; i < tile.m; ++i) {
        const int64_t j = i + tile.diagonal;
        if (j < 0 || j >= tile.n || !takes_part(tile.exponent_bias_a[i]) || !takes_part(tile.exponent_bias_b[j]))
          continue;
        term.rows.total[row + i] = 1;
        term.rows.positive[row + i] = tile.s[i * kTileRow + j];
        if (term.self() || !term.two_sided) continue;
        term.columns.total[column + j] = 1;
        term.columns.positive[column + j] = tile.s[i * kTileRow + j];
      }
    if (term.exclude_self) exclude_diagonal(tile);
    hide(term, tile, row, column);
    const Direction<A>& other = term.other();
    const bool count_columns = term.self() ? row != column : term.two_sided;
    double* sum_b = count_columns ? other.sum + column : nullptr;
    if (term.bounded())
      add_exponentials(tile, term.rows.sum + row, sum_b);
    else
      add_exponentials_with_maxima(tile, term.rows.sum + row, term.rows.highest + row, sum_b,
                                   count_columns ? other.highest + column : nullptr);
  });
}

// Last sweep: gradients of the unit rows from the softmax and, with `pull_diagonal`, from diagonal positives, without
// the factor 1 / temperature. `inspect` sees the plain similarities and may hide some from the softmax, `adjust` may
// add to their gradients.
template <typename A, typename Inspect, typename Adjust>
void add_gradients(std::vector<Term<A>>& terms, bool pull_diagonal, Inspect&& inspect, Adjust&& adjust) {
  for (Term<A>& term : terms) {
    open_rows(term.rows, *term.a, term.scale, term.bounded());
    if (!term.self()) open_rows(term.columns, *term.b, term.scale, term.bounded());
  }
  sweep(terms, [&](const Term<A>& term, const Tile<A>& tile, int64_t row, int64_t column) {
    inspect(term, tile, row, column);
    if (term.exclude_self) exclude_diagonal(tile);
    const Direction<A>&rows = term.rows, &other = term.other();
    if (term.bounded())
      softmax_gradient(tile, rows.softmax_weight + row, other.softmax_weight + column);
    else
      softmax_gradient_with_maxima(tile, rows.softmax(row), other.softmax(column));
    if (pull_diagonal && term.diagonal && !term.exclude_self)
      for (int64_t i = 0; i < tile.m; ++i) {
        const int64_t j = i + tile.diagonal;
        if (j < 0 || j >= tile.n || !takes_part(tile.exponent_bias_a[i]) || !takes_part(tile.exponent_bias_b[j]))
          continue;
        tile.s[i * kTileRow + j] -= rows.attract[row + i] + other.attract[column + j];
      }
    adjust(term, tile, row, column);
    add_tile_gradients(*term.a, *term.b, row, column, tile, !term.self() || row != column);
  });
}

}  // namespace msacore::contrastive::cpu
