// Sums near the largest number. A window's sum can overflow where its mean is representable: a column that holds such
// values is multiplied by a power of two, propagated and scaled back.
#pragma once
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/round.h"
#include "core/types.h"

namespace msacore::propagation {

// For the columns of a conversation of at most `nodes` nodes. Means keep every state within the largest |value|, and
// gradients keep or lower the sum of their |values| over the nodes. So no sum overflows where all |values| are at most
// `limit`, or where finite values are first multiplied by `down`, which is exact except for denormal numbers.
template <typename A>
struct Headroom {
  static constexpr A kLargest = std::numeric_limits<A>::max();
  A limit, down;

  MSACORE_HOST_DEVICE explicit Headroom(int64_t nodes) : limit(kLargest), down(1) {
    for (int64_t room = 1; room < 4 * nodes; room *= 2) down /= 2;
    limit = down * kLargest;
  }

  // Whether a finite value may make a sum overflow. NaN and inf are not counted: they reach the result as they are.
  MSACORE_HOST_DEVICE bool is_beyond(A value) const {
    const A size = value < 0 ? -value : value;
    return size > limit && size <= kLargest;
  }
  // The value scaled back. Rounding may take an average over the largest number, which the exact average cannot exceed.
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
