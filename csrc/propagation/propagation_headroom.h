// Sums near the largest number. A window's sum can overflow where its mean is representable: a column that holds such
// values is propagated times a power of two and scaled back.
#pragma once
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/round.h"
#include "core/types.h"

namespace msacore::propagation {

// Of the columns of a conversation of `nodes` nodes at most. Means keep every state within the largest |value|, and
// gradients keep the sum of their |values| over the nodes or lower it; so no sum leaves the range where |values| are at
// most `limit`, nor where any finite values are multiplied by `down` first, which is exact but for denormal numbers.
template <typename A>
struct Headroom {
  static constexpr A kLargest = std::numeric_limits<A>::max();
  A limit, down;

  MSACORE_HOST_DEVICE explicit Headroom(int64_t nodes) : limit(kLargest), down(1) {
    for (int64_t room = 1; room < 4 * nodes; room *= 2) down /= 2;
    limit = down * kLargest;
  }

  // Of a finite value that may make a sum overflow; NaN and inf do not, they reach the result as they are.
  MSACORE_HOST_DEVICE bool is_beyond(A value) const {
    const A size = value < 0 ? -value : value;
    return size > limit && size <= kLargest;
  }
  // Scaled back, an average: rounding may take it over the largest number, which it cannot exceed.
  MSACORE_HOST_DEVICE A restored(A value, bool average) const {
    if (average && value > limit && value <= kLargest) return kLargest;
    if (average && value < -limit && value >= -kLargest) return -kLargest;
    return value / down;
  }
};

// Whether sums of T can overflow at all: those of float16 stay far within float32.
template <typename T>
constexpr bool kNeedsHeadroom = !std::is_same_v<T, Half>;

}  // namespace msacore::propagation
