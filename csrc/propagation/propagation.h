// Message propagation: what the operators accept on every device, and the code that checks and allocates for all.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <string>

#include "core/allocate.h"
#include "core/optional.h"

namespace msacore::propagation {

// Shapes of the window forms; `width` is d.
struct WindowSizes {
  int64_t utterances, modalities, width, conversations;
};

// When missing nodes send; the values of the integer argument `send`.
enum class Send : int64_t { kAfterFill = 0, kNever = 1 };

enum class Direction { kForward, kBackward };

// A_intra: who is within reach of whom. `positions` [N]; where absent, a row's number is its position.
struct Windows {
  Tensor offsets;
  OptionalTensor positions;
  int64_t past, future;  // -1: the whole side
  bool include_self;
};

// A call of `propagate` (h is x) or of its gradient (h is grad_out); `gate` [N, M] says who sends; where absent,
// everybody does.
struct PropagateCall {
  WindowSizes sizes;
  Windows windows;
  OptionalTensor gate;
  int64_t steps;
  double alpha;
  Send send;
};

struct WindowMeanCall {
  WindowSizes sizes;
  Windows windows;
  OptionalTensor gate;
};

struct ModalityMeanCall {
  WindowSizes sizes;
  OptionalTensor gate;
};

// States [N, M, d] and who sends [N, M]; `name` and `gate_name` are what the operator calls them.
inline WindowSizes check_states(const char* op, const char* name, const Tensor& h, const char* gate_name,
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

inline void check_windows(const char* op, const Windows& windows, const Tensor& h, WindowSizes& sizes) {
  check(windows.past >= -1 && windows.future >= -1, op, "expected the entries of `window` to be at least -1, got (",
        windows.past, ", ", windows.future, ")");
  check_dtype(windows.offsets, op, "offsets", ScalarType::Long);
  check_shape(windows.offsets, op, "offsets", {-1}, "[V + 1]");
  check(windows.offsets.size(0) >= 1, op, "expected `offsets` to have shape [V + 1] with V at least 0, got [0]");
  check_device(windows.offsets, op, "offsets", h);
  check_rows(op, windows.positions, "positions", ScalarType::Long, h.size(0), "[N]", h);
  sizes.conversations = windows.offsets.size(0) - 1;
}

inline Windows contiguous(const Windows& w) {
  return {torch::stable::contiguous(w.offsets), msacore::contiguous(w.positions), w.past, w.future, w.include_self};
}

// The operators of a device. The three functions get checked, contiguous arguments; `out` has the shape and dtype of
// `h` and may be empty.
template <void (*propagate_on)(const char* op, const PropagateCall&, Direction, const Tensor& h, Tensor& out),
          void (*window_mean_on)(const char* op, const WindowMeanCall&, Direction, const Tensor& h, Tensor& out),
          void (*modality_mean_on)(const char* op, const ModalityMeanCall&, Direction, const Tensor& h, Tensor& out)>
struct PropagationOperators {
  template <Direction kDirection>
  static Tensor propagate(const Tensor& x, const Tensor& offsets, const OptionalTensor& available,
                          const OptionalTensor& positions, int64_t past, int64_t future, bool include_self,
                          int64_t steps, double alpha, int64_t send) {
    constexpr bool kForward = kDirection == Direction::kForward;
    constexpr const char* op = kForward ? "propagate" : "propagate_backward";
    check_steps(op, steps, alpha);
    check(send == 0 || send == 1, op, "expected `send` to be 0 (after_fill) or 1 (never), got ", send);
    const Windows windows{offsets, positions, past, future, include_self};
    WindowSizes sizes = check_states(op, kForward ? "x" : "grad_out", x, "available", available);
    check_windows(op, windows, x, sizes);
    const PropagateCall call{sizes, contiguous(windows),    msacore::contiguous(available), steps,
                             alpha, static_cast<Send>(send)};
    return run<propagate_on>(op, call, kDirection, x);
  }

  template <Direction kDirection>
  static Tensor window_mean(const Tensor& h, const Tensor& offsets, const OptionalTensor& senders,
                            const OptionalTensor& positions, int64_t past, int64_t future, bool include_self) {
    constexpr bool kForward = kDirection == Direction::kForward;
    constexpr const char* op = kForward ? "window_mean" : "window_mean_backward";
    const Windows windows{offsets, positions, past, future, include_self};
    WindowSizes sizes = check_states(op, kForward ? "h" : "grad_out", h, "senders", senders);
    check_windows(op, windows, h, sizes);
    const WindowMeanCall call{sizes, contiguous(windows), msacore::contiguous(senders)};
    return run<window_mean_on>(op, call, kDirection, h);
  }

  template <Direction kDirection>
  static Tensor modality_mean(const Tensor& h, const OptionalTensor& senders) {
    constexpr bool kForward = kDirection == Direction::kForward;
    constexpr const char* op = kForward ? "modality_mean" : "modality_mean_backward";
    const WindowSizes sizes = check_states(op, kForward ? "h" : "grad_out", h, "senders", senders);
    return run<modality_mean_on>(op, ModalityMeanCall{sizes, msacore::contiguous(senders)}, kDirection, h);
  }

 private:
  template <auto on_device, typename Call>
  static Tensor run(const char* op, const Call& call, Direction direction, const Tensor& h) {
    Tensor out = empty_tensor(h, {h.size(0), h.size(1), h.size(2)});
    on_device(op, call, direction, torch::stable::contiguous(h), out);
    return out;
  }
};

}  // namespace msacore::propagation
