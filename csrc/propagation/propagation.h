// Message propagation: what the operators accept, on every device.
#pragma once
#include <string>

#include "core/optional.h"

namespace msacore::propagation {

// Shapes of the window forms; `width` is d.
struct WindowSizes {
  int64_t utterances, modalities, width, conversations;
};

// When missing nodes send; the values of the integer argument `send`.
enum class Send : int64_t { kAfterFill = 0, kNever = 1 };

inline void check_window(const char* op, int64_t past, int64_t future) {
  check(past >= -1 && future >= -1, op, "expected the entries of `window` to be at least -1, got (", past, ", ", future,
        ")");
}

inline Send check_send(const char* op, int64_t send) {
  check(send == 0 || send == 1, op, "expected `send` to be 0 (after_fill) or 1 (never), got ", send);
  return static_cast<Send>(send);
}

// States [N, M, d] and who sends [N, M]; `name` and `gate_name` are what the operator calls them.
inline WindowSizes check_states(const char* op, const std::string& name, const Tensor& h, const std::string& gate_name,
                                const OptionalTensor& gate) {
  check_floating(h, op, name);
  check_shape(h, op, name, {-1, -1, -1}, "[N, M, d]");
  if (gate) {
    check_dtype(*gate, op, gate_name, ScalarType::Bool);
    check_shape(*gate, op, gate_name, {h.size(0), h.size(1)}, "[N, M]");
    check_device(*gate, op, gate_name, h);
  }
  return {h.size(0), h.size(1), h.size(2), 0};
}

inline int64_t check_offsets(const char* op, const Tensor& offsets, const Tensor& like) {
  check_dtype(offsets, op, "offsets", ScalarType::Long);
  check_shape(offsets, op, "offsets", {-1}, "[V + 1]");
  check(offsets.size(0) >= 1, op, "expected `offsets` to have shape [V + 1] with V at least 0, got [0]");
  check_device(offsets, op, "offsets", like);
  return offsets.size(0) - 1;
}

}  // namespace msacore::propagation
