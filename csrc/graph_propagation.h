// The order in which half-steps h ← (1-α) A h + α x go through an operator's graphs, on every device.
#pragma once
#include <vector>

#include "propagation.h"

namespace msacore::propagation {

using OptionalTensor = std::optional<Tensor>;

// `Input` is a graph argument, checked and made ready for a device: Input(op, prefix of its names, x, graph).
template <typename Input>
using HalfStepsOf = std::vector<const Input*>;

// The three graphs of the alternation and their order; without `first_intra` the first step uses `intra` too.
template <typename Input>
struct AlternationOf {
  Input intra, inter;
  std::optional<Input> first;

  AlternationOf(const char* op, const Tensor& x, const Graph& intra_, const Graph& inter_,
                const OptionalTensor& first_rowptr, const OptionalTensor& first_col, const OptionalTensor& first_weight)
      : intra(op, "intra_", x, intra_), inter(op, "inter_", x, inter_) {
    check(first_rowptr.has_value() == first_col.has_value() && (first_rowptr || !first_weight), op,
          "expected `first_intra_rowptr` and `first_intra_col` together or not at all, got one of them");
    if (first_rowptr) first.emplace(op, "first_intra_", x, Graph{*first_rowptr, *first_col, first_weight});
  }

  std::vector<const Input*> graphs() const {
    return first ? std::vector<const Input*>{&intra, &inter, &*first} : std::vector<const Input*>{&intra, &inter};
  }
  HalfStepsOf<Input> half_steps(int64_t steps) const {
    HalfStepsOf<Input> out;
    for (int64_t k = 0; k < steps; ++k) {
      out.push_back(k == 0 && first ? &*first : &intra);
      out.push_back(&inter);
    }
    return out;
  }
};

}  // namespace msacore::propagation
