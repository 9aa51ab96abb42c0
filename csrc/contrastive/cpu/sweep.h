// The two sweeps of contrastive losses over their tiles: sums of exponentials forward, gradients of unit rows backward.
// A loss is a list of terms between sides (embeddings); all terms share the sides and one schedule.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/buffer.h"
#include "core/dtype.h"
#include "contrastive/cpu/tiles.h"

namespace msacore::contrastive::cpu {
using namespace msacore::cpu;

// unit [rows, stride] ← x / |x|, and the same transposed in panels of kPanel rows; rows that take no part stay unread
// and become zero, as do zero rows. Handles rows begin … end, multiples of kPanel.
template <typename T, typename A>
MSACORE_SIMD void normalise_rows(const T* __restrict__ x, const uint8_t* __restrict__ used, A* __restrict__ unit,
                                 A* __restrict__ panels, A* __restrict__ inverse_norm, int64_t n, int64_t d,
                                 int64_t width, int64_t stride, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    A* row = unit + i * stride;
    for (int64_t k = 0; k < width; ++k) row[k] = 0;
    inverse_norm[i] = 0;
    if (i >= n || !used[i]) continue;
    double square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t k = 0; k < d; ++k) {
      const double value = static_cast<double>(static_cast<A>(x[i * d + k]));
      square += value * value;
    }
    const double inverse = square == 0 ? 0 : 1 / std::sqrt(square);
    inverse_norm[i] = static_cast<A>(inverse);
    for (int64_t k = 0; k < d; ++k) row[k] = static_cast<A>(static_cast<A>(x[i * d + k]) * inverse);
  }
  for (int64_t i = begin; i < end; i += kPanel)
    for (int64_t k = 0; k < width; ++k)
      for (int64_t r = 0; r < kPanel; ++r) panels[i * width + k * kPanel + r] = unit[(i + r) * stride + k];
}

// grad_x ← (g - <g, u> u) scale / |x| and pull[i] ← <g, u>, for rows begin … end; zero where a row takes no part.
template <typename T, typename A>
MSACORE_SIMD void project_rows(const A* __restrict__ gradient, const A* __restrict__ unit,
                               const A* __restrict__ inverse_norm, T* __restrict__ grad_x, double* __restrict__ pull,
                               A scale, int64_t d, int64_t width, int64_t stride, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const A *g = gradient + i * width, *u = unit + i * stride;
    A dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t k = 0; k < d; ++k) dot += g[k] * u[k];
    pull[i] = dot;
    const A factor = inverse_norm[i] * scale;
    if (inverse_norm[i] == 0) {
      for (int64_t k = 0; k < d; ++k) grad_x[i * d + k] = static_cast<T>(0.0f);
      continue;
    }
    for (int64_t k = 0; k < d; ++k) grad_x[i * d + k] = static_cast<T>((g[k] - dot * u[k]) * factor);
  }
}

// One embedding: its unit rows, padded to whole panels, and the gradient with respect to them.
template <typename A>
struct Side {
  int64_t n = 0, d = 0, rows = 0, width = 0, stride = 0;
  Buffer<A> unit, panels, inverse_norm, gradient;

  // Allocates; `normalise` fills.
  Side(int64_t n, int64_t d) : n(n), d(d), rows(padded(n)), width(padded(d)) {
    stride = width / kPanel % 2 ? width : width + kPanel;  // odd number of lines, see kTileRow
    unit = Buffer<A>(rows * stride);
    panels = Buffer<A>(rows * width);
    inverse_norm = Buffer<A>(rows);
  }

  template <typename T>
  Side(const T* x, const uint8_t* used, int64_t n, int64_t d) : Side(n, d) {
    torch::stable::parallel_for(0, rows / kPanel, grain(kPanel * width),
                                [&](int64_t b, int64_t e) { normalise(x, used, b, e); });
  }

  // Panels begin … end of kPanel rows.
  template <typename T>
  void normalise(const T* x, const uint8_t* used, int64_t begin, int64_t end) {
    normalise_rows(x, used, unit.get(), panels.get(), inverse_norm.get(), n, d, width, stride, begin * kPanel,
                   end * kPanel);
  }

  // Gradient with respect to x; returns Σ <gradient, unit row>.
  template <typename T>
  double project(T* grad_x, A scale) const {
    Buffer<double> pull(n);
    torch::stable::parallel_for(0, n, grain(width), [&](int64_t b, int64_t e) {
      project_rows(gradient.get(), unit.get(), inverse_norm.get(), grad_x, pull.get(), scale, d, width, stride, b, e);
    });
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += pull[i];
    return sum;
  }

  const A* row(int64_t i) const { return unit.get() + i * stride; }

  static int64_t grain(int64_t work) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)); }
};

// What one direction of a term keeps per row.
template <typename A>
struct Direction {
  Buffer<uint8_t> used;        // row takes part, as anchor and as candidate
  Buffer<int64_t> candidates;  // how many it has
  Buffer<A> from;              // exponent of a similarity of -scale: see Tile
  Buffer<double> sum;          // Σ_j 2^(exponent)
  Buffer<A> highest;           // running maximum, for unbounded exponents
  Buffer<double> total;        // weight of the positives; 0: the anchor drops out
  Buffer<double> positive;     // mean similarity of the positives
  Buffer<A> share, log;        // backward: weight of the softmax, and log2-sum-exp
  Buffer<A> attract;           // backward: weight of each positive pair

  // An only candidate has probability 1: loss and gradient are zero, exactly.
  bool choice(int64_t i) const { return candidates[i] != 1; }
};

template <typename A>
void count_candidates(Direction<A>& direction, int64_t n, const Direction<A>& other, int64_t other_n,
                      bool exclude_self) {
  const int64_t all = std::count(other.used.get(), other.used.get() + other_n, 1);
  direction.candidates = Buffer<int64_t>(n);
  for (int64_t i = 0; i < n; ++i) direction.candidates[i] = all - (exclude_self && i < other_n && other.used[i]);
}

template <typename A>
struct Term {
  Side<A>*a, *b;  // equal for a loss of an embedding with itself
  double scale;   // log2(e) / temperature
  bool both;      // are columns anchors too
  bool diagonal;  // positives are the pairs (i, i)
  bool exclude_self;
  Direction<A> rows, columns;  // of a self term, only rows

  bool self() const { return a == b; }
  bool bounded() const { return is_bounded<A>(scale); }
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
  const auto blocks = [block](const Side<A>* side) { return (side->rows + block - 1) / block; };
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
  const auto rounds_of = [&](const Side<A>* side, int64_t index) -> std::vector<bool>& {
    for (auto& entry : busy)
      if (entry.first == side) return entry.second[index];
    busy.push_back({side, std::vector<std::vector<bool>>(blocks(side))});
    return busy.back().second[index];
  };
  for (const Term<A>& term : terms) rounds_of(term.a, 0), rounds_of(term.b, 0);
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
        const Tile<A> tile{
            m,    n, scratch.get(), term.rows.from.get() + i, term.other().from.get() + j, static_cast<A>(term.scale),
            i - j};
        work(term, tile, i, j);
      }
    });
  }
}

// What the exponents of rows start from: -scale where every exponent is bounded, 0 otherwise, -inf without a row.
template <typename A>
void open_rows(Direction<A>& direction, const Side<A>& side, double scale, bool bounded) {
  direction.from = Buffer<A>(side.rows, -std::numeric_limits<A>::infinity());
  for (int64_t i = 0; i < side.n; ++i)
    if (direction.used[i]) direction.from[i] = bounded ? -static_cast<A>(scale) : A(0);
}

template <typename A>
void start_sums(Direction<A>& direction, const Side<A>& side, bool bounded) {
  direction.sum = Buffer<double>(side.rows, 0.0);
  if (!bounded) direction.highest = Buffer<A>(side.rows, -std::numeric_limits<A>::infinity());
  direction.total = Buffer<double>(side.rows, 0.0);
  direction.positive = Buffer<double>(side.rows, 0.0);
}

// First sweep: sums of exponentials, and the positives of diagonal terms. `inspect` sees the plain similarities first.
template <typename A, typename Inspect>
void sum_exponentials(std::vector<Term<A>>& terms, Inspect&& inspect) {
  for (Term<A>& term : terms) {
    open_rows(term.rows, *term.a, term.scale, term.bounded());
    start_sums(term.rows, *term.a, term.bounded());
    if (term.self()) continue;
    open_rows(term.columns, *term.b, term.scale, term.bounded());
    start_sums(term.columns, *term.b, term.bounded());
  }
  sweep(terms, [&](const Term<A>& term, const Tile<A>& tile, int64_t row, int64_t column) {
    inspect(term, tile, row, column);
    if (term.diagonal)
      for (int64_t i = 0; i < tile.m; ++i) {
        const int64_t j = i + tile.diagonal;
        if (j < 0 || j >= tile.n || !takes_part(tile.from_a[i]) || !takes_part(tile.from_b[j])) continue;
        term.rows.total[row + i] = 1;
        term.rows.positive[row + i] = tile.s[i * kTileRow + j];
        if (term.self() || !term.both) continue;
        term.columns.total[column + j] = 1;
        term.columns.positive[column + j] = tile.s[i * kTileRow + j];
      }
    if (term.exclude_self) exclude_diagonal(tile);
    const Direction<A>& other = term.other();
    const bool count_columns = term.self() ? row != column : term.both;
    double* sum_b = count_columns ? other.sum.get() + column : nullptr;
    if (term.bounded())
      add_exponentials(tile, term.rows.sum.get() + row, sum_b);
    else
      add_exponentials_with_maxima(tile, term.rows.sum.get() + row, term.rows.highest.get() + row, sum_b,
                                   count_columns ? other.highest.get() + column : nullptr);
  });
}

// Losses per anchor of one direction, zero where dropped, and how many count. Fills stats [4, n]: highest similarity,
// logarithm of the sum of exponentials relative to it, mean similarity of the positives, their total weight.
template <typename A>
std::vector<double> anchor_losses(const Term<A>& term, const Direction<A>& direction, int64_t n, A* stats,
                                  int64_t* count) {
  const double scale = static_cast<double>(static_cast<A>(term.scale));
  std::vector<double> loss(n, 0.0);
  *count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = direction.total[i] != 0;
    double highest = 0, log = 0;  // the logarithm to base 2
    if (kept) {
      highest = term.bounded() ? 1.0 : static_cast<double>(direction.highest[i]) / scale;
      log = std::log2(direction.sum[i]);
    }
    if (kept && direction.choice(i)) loss[i] = ((highest - direction.positive[i]) * scale + log) * M_LN2;
    *count += kept;
    stats[i] = static_cast<A>(highest);
    stats[n + i] = static_cast<A>(log * M_LN2);
    stats[2 * n + i] = static_cast<A>(kept ? direction.positive[i] : 0.0);
    stats[3 * n + i] = static_cast<A>(direction.total[i]);
  }
  return loss;
}

// Shares of softmax and positives in the gradient, from the stats of the forward pass (null: no anchors here);
// gradient_of(i, count) is the gradient of the loss of anchor i, of `count` that are kept.
template <typename A, typename GradientOf>
void load_shares(const Term<A>& term, Direction<A>& direction, const Side<A>& side, const A* stats,
                 GradientOf&& gradient_of) {
  const double scale = static_cast<double>(static_cast<A>(term.scale));
  const int64_t n = side.n;
  int64_t count = 0;
  for (int64_t i = 0; stats && i < n; ++i) count += stats[3 * n + i] != 0;
  direction.share = Buffer<A>(side.rows, A(0));
  direction.log = Buffer<A>(side.rows, std::numeric_limits<A>::infinity());
  direction.attract = Buffer<A>(side.rows, A(0));
  direction.positive = Buffer<double>(side.rows, 0.0);
  for (int64_t i = 0; stats && i < n; ++i) {
    if (stats[3 * n + i] == 0 || !direction.choice(i)) continue;
    const double gradient = gradient_of(i, count), log = stats[i] * scale + stats[n + i] * M_LOG2E;
    direction.log[i] = static_cast<A>(log);
    direction.share[i] =
        static_cast<A>(term.bounded() ? gradient * exp2_of(static_cast<A>(term.scale) - log) : gradient);
    direction.attract[i] = static_cast<A>(gradient / stats[3 * n + i]);
    direction.positive[i] = stats[2 * n + i];
  }
}

// Second sweep: gradients of the unit rows from the softmax and from diagonal positives, without the factor
// 1 / temperature. `adjust` may add to the gradients of the similarities, given the similarities themselves.
template <typename A, typename Inspect, typename Adjust>
void add_gradients(std::vector<Term<A>>& terms, Inspect&& inspect, Adjust&& adjust) {
  for (Term<A>& term : terms) {
    open_rows(term.rows, *term.a, term.scale, term.bounded());
    if (!term.self()) open_rows(term.columns, *term.b, term.scale, term.bounded());
  }
  sweep(terms, [&](const Term<A>& term, const Tile<A>& tile, int64_t row, int64_t column) {
    inspect(term, tile, row, column);
    if (term.exclude_self) exclude_diagonal(tile);
    const Direction<A>&rows = term.rows, &other = term.other();
    if (term.bounded())
      softmax_gradient(tile, rows.share.get() + row, other.share.get() + column);
    else
      softmax_gradient_with_maxima(tile, rows.share.get() + row, rows.log.get() + row, other.share.get() + column,
                                   other.log.get() + column);
    if (term.diagonal && !term.exclude_self)
      for (int64_t i = 0; i < tile.m; ++i) {
        const int64_t j = i + tile.diagonal;
        if (j < 0 || j >= tile.n || !takes_part(tile.from_a[i]) || !takes_part(tile.from_b[j])) continue;
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
