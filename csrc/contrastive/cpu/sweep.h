// The two sweeps of contrastive losses over their tiles: sums of exponentials forward, gradients of unit rows backward.
// A loss is a list of terms between sides (embeddings); all terms share the sides and one schedule.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "contrastive/cpu/side.h"
#include "core/round.h"

namespace msacore::contrastive::cpu {

// What one direction of a term keeps per row.
template <typename A>
struct Direction {
  Buffer<uint8_t> used;        // row takes part, as anchor and as candidate
  Buffer<int64_t> candidates;  // how many it has
  Buffer<A> exponent_bias;     // see Tile
  Buffer<double> sum;          // Σ_j 2^(exponent) of the denominator
  Buffer<A> highest;           // its highest similarity so far, for unbounded exponents
  Buffer<double> total;        // weight of the positives; 0: the anchor drops out
  Buffer<double> positive;     // mean similarity of the positives, or what info_nce.h says
  Buffer<A> softmax_weight, shift,
      log;            // weight of the softmax, and its log2-sum-exp relative to the similarity `shift`
  Buffer<A> attract;  // backward: weight of each positive pair

  // An only candidate has probability 1: loss and gradient are zero, exactly.
  bool choice(int64_t i) const { return candidates[i] != 1; }
  Softmax<A> softmax(int64_t first) const {
    return {softmax_weight.get() + first, shift.get() + first, log.get() + first};
  }
};

inline int64_t count_used(const Buffer<uint8_t>& used, int64_t n) { return std::count(used.get(), used.get() + n, 1); }

// Number of candidates of every row out of the `all` that take part; has_partner(i) is true where (i, i) is excluded
// and would otherwise take part.
template <typename A, typename HasPartner>
void count_candidates(Direction<A>& direction, int64_t n, int64_t all, HasPartner&& has_partner) {
  direction.candidates = Buffer<int64_t>(n);
  for (int64_t i = 0; i < n; ++i) direction.candidates[i] = all - has_partner(i);
}

template <typename A>
struct Term {
  Side<A>*a, *b;   // equal for a loss of an embedding with itself
  double scale;    // log2(e) / temperature
  bool two_sided;  // are columns anchors too
  bool diagonal;   // positives are the pairs (i, i + offset)
  bool exclude_self;
  int64_t offset = 0;          // the partner of row i is column i + offset
  Direction<A> rows, columns;  // of a self term, only rows

  bool self() const { return a == b; }
  bool bounded() const { return a->normalize && is_bounded<A>(scale); }
  const Direction<A>& other() const { return self() ? rows : columns; }
};

struct TileIndex {
  int64_t term, row, column;  // row and column count blocks
};

// Rounds of tiles no two of which touch the same rows of a side: their threads add up without locks, in one fixed
// order.
template <typename A>
std::vector<std::vector<TileIndex>> schedule(const std::vector<Term<A>>& terms, int64_t block) {
  std::vector<TileIndex> tiles;
  int64_t most = 0;
  const auto blocks = [block](const Side<A>* side) { return ceil_div(side->rows, block); };
  for (const Term<A>& term : terms) most = std::max({most, blocks(term.a), blocks(term.b)});
  for (int64_t r = 0; r < most; ++r)
    for (size_t t = 0; t < terms.size(); ++t) {
      const int64_t na = blocks(terms[t].a), nb = blocks(terms[t].b), term = static_cast<int64_t>(t);
      if (terms[t].self()) {
        // Round-robin tournament: every pair of blocks once, every block once a round.
        for (int64_t i = 0; i < na; ++i) {
          const int64_t j = ((r - i) % na + na) % na;
          if (i <= j) tiles.push_back({term, i, j});
        }
      } else if (r < std::max(na, nb)) {
        for (int64_t i = 0; i < std::min(na, nb); ++i)
          na <= nb ? tiles.push_back({term, i, (i + r) % nb}) : tiles.push_back({term, (i + r) % na, i});
      }
    }
  std::vector<std::pair<const Side<A>*, std::vector<std::vector<bool>>>> busy;  // [side][block][round]
  const auto entry_of = [&](const Side<A>* side) {
    return std::find_if(busy.begin(), busy.end(), [side](const auto& entry) { return entry.first == side; });
  };
  for (const Term<A>& term : terms)
    for (const Side<A>* side : {term.a, term.b})
      if (entry_of(side) == busy.end()) busy.push_back({side, std::vector<std::vector<bool>>(blocks(side))});
  const auto rounds_of = [&](const Side<A>* side, int64_t index) -> std::vector<bool>& {
    return entry_of(side)->second[index];
  };
  std::vector<std::vector<TileIndex>> rounds;
  for (const TileIndex& tile : tiles) {
    std::vector<bool>& first = rounds_of(terms[tile.term].a, tile.row);
    std::vector<bool>& second = rounds_of(terms[tile.term].b, tile.column);
    size_t r = 0;
    while ((r < first.size() && first[r]) || (r < second.size() && second[r])) ++r;
    if (r >= rounds.size()) rounds.resize(r + 1);
    if (r >= first.size()) first.resize(r + 1);
    first[r] = true;
    if (r >= second.size()) second.resize(r + 1);
    second[r] = true;
    rounds[r].push_back(tile);
  }
  return rounds;
}

// Rows of a block: large enough to keep products efficient, small enough to give every thread several.
template <typename A>
int64_t block_size(const std::vector<Term<A>>& terms) {
  int64_t rows = 0;
  for (const Term<A>& term : terms) rows = std::max({rows, term.a->rows, term.b->rows});
  int64_t block = kBlock;
  while (block > 32 && rows < 4 * block) block /= 2;
  return block;
}

// Calls work(term, tile, row offset, column offset) for every tile, with the similarities computed.
template <typename A, typename Work>
void sweep(const std::vector<Term<A>>& terms, Work&& work) {
  const int64_t block = block_size(terms);
  for (const auto& round : schedule(terms, block)) {
    const TileIndex& first = round.front();
    const int64_t flops = terms[first.term].a->width * std::min(block, terms[first.term].a->rows) *
                          std::min(block, terms[first.term].b->rows);
    const int64_t grain = std::max<int64_t>(1, 100000 / std::max<int64_t>(1, flops));
    torch::stable::parallel_for(0, static_cast<int64_t>(round.size()), grain, [&](int64_t begin, int64_t end) {
      const Buffer<A> scratch(block * kTileRow);
      for (int64_t k = begin; k < end; ++k) {
        const Term<A>& term = terms[round[k].term];
        const Side<A>&a = *term.a, &b = *term.b;
        const int64_t i = round[k].row * block, j = round[k].column * block;
        const int64_t m = std::min(block, a.rows - i), n = std::min(block, b.rows - j);
        small_product<A>({m, n, a.d, a.row(i), a.stride, 1, b.panels.get() + j * b.width, kPanel * b.width, kPanel,
                          scratch.get(), kTileRow, false});
        const Tile<A> tile{m,
                           n,
                           scratch.get(),
                           term.rows.exponent_bias.get() + i,
                           term.other().exponent_bias.get() + j,
                           static_cast<A>(term.scale),
                           i - j + term.offset};
        work(term, tile, i, j);
      }
    });
  }
}

// What is added to exponents (where all are bounded) or similarities of rows: -scale or 0; -inf without a row.
template <typename A>
void open_rows(Direction<A>& direction, const Side<A>& side, double scale, bool bounded) {
  direction.exponent_bias = Buffer<A>(side.rows, -std::numeric_limits<A>::infinity());
  for (int64_t i = 0; i < side.n; ++i)
    if (direction.used[i]) direction.exponent_bias[i] = bounded ? -static_cast<A>(scale) : A(0);
}

template <typename A>
void init_sums(Direction<A>& direction, const Side<A>& side, bool bounded) {
  direction.sum = Buffer<double>(side.rows, 0.0);
  if (!bounded) direction.highest = Buffer<A>(side.rows, -std::numeric_limits<A>::infinity());
  direction.total = Buffer<double>(side.rows, 0.0);
  direction.positive = Buffer<double>(side.rows, 0.0);
}

// First sweep: sums of exponentials, and the positives of diagonal terms. `inspect` sees the plain similarities first;
// `hide` may then set those to -inf that no denominator holds.
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
    double* sum_b = count_columns ? other.sum.get() + column : nullptr;
    if (term.bounded())
      add_exponentials(tile, term.rows.sum.get() + row, sum_b);
    else
      add_exponentials_with_maxima(tile, term.rows.sum.get() + row, term.rows.highest.get() + row, sum_b,
                                   count_columns ? other.highest.get() + column : nullptr);
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
      softmax_gradient(tile, rows.softmax_weight.get() + row, other.softmax_weight.get() + column);
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
    const Side<A>&a = *term.a, &b = *term.b;
    small_product<A>({tile.m, a.width, tile.n, tile.s, kTileRow, 1, b.row(column), kPanel, b.stride,
                      a.gradient.get() + row * a.width, a.width, true});
    if (!term.self() || row != column)
      small_product<A>({tile.n, b.width, tile.m, tile.s, 1, kTileRow, a.row(row), kPanel, a.stride,
                        b.gradient.get() + column * b.width, b.width, true});
  });
}

}  // namespace msacore::contrastive::cpu
