// The terms of a loss, and the order in which their tiles are processed: threads take any tile whose rows are free, yet
// every row meets its tiles in one fixed order, so that results do not depend on which thread was faster.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "contrastive/cpu/side.h"
#include "core/round.h"

namespace msacore::contrastive::cpu {

// What one direction of a term keeps per row.
template <typename A>
struct Direction {
  uint8_t* used;        // row takes part, as anchor and as candidate
  int64_t* candidates;  // how many candidates it has
  A* exponent_bias;     // see Tile
  double* sum;          // Σ_j 2^(exponent) of the denominator
  A* highest;           // its highest similarity so far, for unbounded exponents
  double* total;        // weight of the positives; 0: the anchor drops out
  double* positive;     // mean similarity of the positives, or what info_nce.h says
  A* softmax_weight;    // weight of the softmax
  A *shift, *log;       // and its log2-sum-exp relative to the similarity `shift`
  A* attract;           // backward: weight of each positive pair
  Buffer<char> memory;  // one block for all: with few rows, a block each would cost more than filling it

  // Allocates for n rows, padded, and leaves them uninitialised.
  void allocate(int64_t n) {
    const int64_t rows = padded(n);
    memory = Buffer<char>(rows * (sizeof(*used) + sizeof(*candidates) + 3 * sizeof(double) + 6 * sizeof(A)));
    char* next = memory.get();
    const auto take = [&](auto*& piece) {
      piece = reinterpret_cast<std::remove_reference_t<decltype(piece)>>(next);
      next += rows * sizeof(*piece);
    };
    take(candidates), take(sum), take(total), take(positive);
    take(exponent_bias), take(highest), take(softmax_weight), take(shift), take(log), take(attract);
    take(used);
  }

  // A single candidate has probability 1: loss and gradient are exactly zero.
  bool choice(int64_t i) const { return candidates[i] != 1; }
  Softmax<A> softmax(int64_t first) const { return {softmax_weight + first, shift + first, log + first}; }
};

inline int64_t count_used(const uint8_t* used, int64_t n) { return std::count(used, used + n, 1); }

// Number of candidates of every row out of the `all` that take part; has_partner(i) is true where (i, i) is excluded
// and would otherwise take part.
template <typename A, typename HasPartner>
void count_candidates(Direction<A>& direction, int64_t n, int64_t all, HasPartner&& has_partner) {
  for (int64_t i = 0; i < n; ++i) direction.candidates[i] = all - has_partner(i);
}

template <typename A>
struct Term {
  Side<A>*a, *b;   // equal for a loss of an embedding with itself
  double scale;    // log2(e) / temperature
  bool two_sided;  // columns are anchors too
  bool diagonal;   // positives are the pairs (i, i + offset)
  bool exclude_self;
  int64_t offset = 0;          // the partner of row i is column i + offset
  A* kept = nullptr;           // [rows of a, rows of b] or null: similarities that one sweep keeps for the next
  bool known = false;          // `kept` holds them already
  Direction<A> rows, columns;  // a self term keeps its sums in `rows` alone

  bool self() const { return a == b; }
  bool bounded() const { return a->normalize && is_bounded<A>(scale); }
  const Direction<A>& other() const { return self() ? rows : columns; }
};

struct TileIndex {
  int64_t term, row, column;  // row and column count blocks
};

// Rounds of tiles. No two tiles of a round touch the same rows of a side, so that threads add up without locks and in
// one fixed order.
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

// The tiles of all rounds as steps. A step waits for the steps of earlier rounds that touch the same rows, and for no
// others: there is no barrier, and a thread that another process holds up delays only the threads that need its rows.
template <typename A>
class Steps {
 public:
  Steps(const std::vector<Term<A>>& terms, int64_t block) {
    std::vector<const Side<A>*> sides;
    std::vector<int64_t> first_block{0}, before;
    const auto number_of = [&](const Side<A>* side, int64_t index) {
      const auto found = std::find(sides.begin(), sides.end(), side) - sides.begin();
      if (found == static_cast<int64_t>(sides.size())) {
        sides.push_back(side);
        first_block.push_back(first_block.back() + ceil_div(side->rows, block));
        before.resize(first_block.back());
      }
      return first_block[found] + index;
    };
    double flops = 0;
    for (const auto& round : schedule(terms, block))
      for (const TileIndex& tile : round) {
        const Term<A>& term = terms[tile.term];
        const int64_t row = number_of(term.a, tile.row), column = number_of(term.b, tile.column);
        steps_.push_back({tile, row, column, before[row], before[column]});
        ++before[row];
        if (row != column) ++before[column];
        flops += static_cast<double>(term.a->width) * std::min(block, term.a->rows) * std::min(block, term.b->rows);
      }
    taken_ = std::make_unique<std::atomic<bool>[]>(steps_.size());
    done_ = std::make_unique<std::atomic<int64_t>[]>(before.size());
    for (size_t k = 0; k < steps_.size(); ++k) taken_[k] = false;
    for (size_t k = 0; k < before.size(); ++k) done_[k] = 0;
    constexpr double kThreadPays = 1e5;  // multiplications
    workers_ = std::clamp<int64_t>(static_cast<int64_t>(flops / kThreadPays), 1, torch::stable::get_num_threads());
    workers_ = std::min<int64_t>(workers_, std::max<size_t>(1, steps_.size()));
  }
  int64_t workers() const { return workers_; }

  // Called by every thread: calls work(tile) until no step is left.
  template <typename Work>
  void run(Work&& work) {
    for (int64_t k = take(); k >= 0; k = take()) {
      const Step& step = steps_[k];
      try {
        work(step.tile);
      } catch (...) {
        failed_ = true;  // the others must not wait for it
        throw;
      }
      done_[step.row].fetch_add(1, std::memory_order_release);
      if (step.row != step.column) done_[step.column].fetch_add(1, std::memory_order_release);
    }
  }

 private:
  struct Step {
    TileIndex tile;
    int64_t row, column;                // blocks of rows, numbered over all sides
    int64_t before_row, before_column;  // earlier steps that touch them
  };

  bool ready(const Step& step) const {
    return done_[step.row].load(std::memory_order_acquire) == step.before_row &&
           done_[step.column].load(std::memory_order_acquire) == step.before_column;
  }

  // Takes a step that is ready; returns its index, or -1 once all are taken or one has failed.
  int64_t take() {
    constexpr int64_t kAhead = 256;  // steps examined from the first that is left on
    const int64_t all = static_cast<int64_t>(steps_.size());
    while (!failed_.load(std::memory_order_relaxed)) {
      int64_t first = first_left_.load(std::memory_order_relaxed);
      while (first < all && taken_[first].load(std::memory_order_relaxed)) ++first;
      if (first == all) return -1;
      first_left_.store(first, std::memory_order_relaxed);  // a hint: an older value costs a few more checks
      for (int64_t k = first; k < std::min(all, first + kAhead); ++k)
        if (!taken_[k].load(std::memory_order_relaxed) && ready(steps_[k]) && !taken_[k].exchange(true)) return k;
      std::this_thread::yield();
    }
    return -1;
  }

  std::vector<Step> steps_;
  std::unique_ptr<std::atomic<bool>[]> taken_;
  std::unique_ptr<std::atomic<int64_t>[]> done_;  // steps done, per block of rows
  std::atomic<int64_t> first_left_{0};
  std::atomic<bool> failed_{false};
  int64_t workers_ = 1;
};

}  // namespace msacore::contrastive::cpu
