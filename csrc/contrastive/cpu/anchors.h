// From sums over tiles to the losses of anchors, and from what the forward pass kept of anchors to their weights in the
// gradient.
#pragma once
#include <limits>

#include "contrastive/cpu/sweep.h"

namespace msacore::contrastive::cpu {

// The highest similarity in the denominator of anchor i (1 for all where exponents are bounded; 0 where it is empty),
// and the logarithm (base 2) of the sum of exponentials relative to it; -inf where it is empty.
template <typename A>
struct Denominator {
  double highest, log;

  Denominator(const Term<A>& term, const Direction<A>& direction, int64_t i) {
    const bool empty = direction.sum[i] == 0;
    highest = empty ? 0.0 : term.bounded() ? 1.0 : static_cast<double>(direction.highest[i]);
    log = empty ? -std::numeric_limits<double>::infinity() : std::log2(direction.sum[i]);
  }
};

// Losses per anchor of one direction, zero for anchors that drop out, and how many count. Fills stats [4, n]: highest
// similarity, logarithm of the sum of exponentials relative to it, mean similarity of the positives, their total
// weight. With `disjoint` the denominators hold no positive, and an anchor without any other candidate drops out.
template <typename A>
std::vector<double> anchor_losses(const Term<A>& term, const Direction<A>& direction, int64_t n, bool disjoint,
                                  A* stats, int64_t* count) {
  const double scale = static_cast<double>(static_cast<A>(term.scale));
  std::vector<double> loss(n, 0.0);
  *count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Denominator<A> all(term, direction, i);
    const bool kept = direction.total[i] != 0 && !(disjoint && direction.sum[i] == 0);
    if (kept && (disjoint || direction.choice(i)))
      loss[i] = ((all.highest - direction.positive[i]) * scale + all.log) * M_LN2;
    *count += kept;
    stats[i] = static_cast<A>(kept ? all.highest : 0.0);
    stats[n + i] = static_cast<A>(kept ? all.log * M_LN2 : 0.0);
    stats[2 * n + i] = static_cast<A>(kept ? direction.positive[i] : 0.0);
    stats[3 * n + i] = static_cast<A>(kept ? direction.total[i] : 0.0);
  }
  return loss;
}

template <typename A>
int64_t count_anchors(const A* stats, int64_t n) {
  return stats ? n - std::count(stats + 3 * n, stats + 4 * n, A(0)) : 0;
}

// Weights of softmax and positives in the gradient, from the stats of the forward pass (null: no anchors here) for the
// first n rows of a side. gradient_of(i) is the gradient of the loss of anchor i; softmax_of(i) times that is the
// weight of its softmax. Without `choice_matters`, an anchor with a single candidate has a gradient too.
template <typename A, typename GradientOf, typename SoftmaxOf>
void load_shares(const Term<A>& term, Direction<A>& direction, const Side<A>& side, int64_t n, const A* stats,
                 bool choice_matters, GradientOf&& gradient_of, SoftmaxOf&& softmax_of) {
  const double scale = static_cast<double>(static_cast<A>(term.scale));
  for (A* weights : {direction.softmax_weight, direction.shift, direction.attract})
    std::fill_n(weights, side.rows, A(0));
  std::fill_n(direction.log, side.rows, std::numeric_limits<A>::infinity());
  std::fill_n(direction.positive, side.rows, 0.0);
  for (int64_t i = 0; stats && i < n; ++i) {
    if (stats[3 * n + i] == 0 || (choice_matters && !direction.choice(i))) continue;
    const double gradient = gradient_of(i), log = stats[n + i] * M_LOG2E;
    direction.attract[i] = static_cast<A>(gradient / stats[3 * n + i]);
    direction.positive[i] = stats[2 * n + i];
    direction.shift[i] = stats[i];
    if (log == -std::numeric_limits<double>::infinity()) continue;  // nothing in the denominator
    direction.log[i] = static_cast<A>(log);
    const double weight = gradient * softmax_of(i);
    direction.softmax_weight[i] =
        static_cast<A>(term.bounded() ? weight * std::exp2((1 - stats[i]) * scale - log) : weight);
  }
}

}  // namespace msacore::contrastive::cpu
