// The Python module `_C`. Importing it registers the operators; it binds nothing that takes a tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include <map>
#include <string>
#include <utility>

#include "cpu/interrupt.h"
#include "cpu/simd.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", compiler()},
      {"cpp_standard", std::to_string(__cplusplus)},
      {"torch", MSACORE_TORCH_VERSION},
      {"cuda", MSACORE_CUDA_VERSION},
      {"cuda_architectures", MSACORE_CUDA_ARCHITECTURES},
      {"simd_compiled", msacore::cpu::simd_compiled()},
      {"simd_active", msacore::cpu::simd_active()},
      {"threads", std::to_string(torch::stable::get_num_threads())},
  };
}

// The exception that a signal handler raised while an operator ran, until Python takes it. Never destroyed, because the
// interpreter may end first.
pybind11::object& raised() {
  static auto* const exception = new pybind11::object(pybind11::none());
  return *exception;
}

bool handlers_raise() {
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return false;
  raised() = pybind11::error_already_set().value();
  return true;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "Compiler, instruction sets, CUDA version and architectures of this build.");
  m.def(
      "hear_signals", [] { msacore::cpu::interrupt_hook = &handlers_raise; },
      "Make long-running CPU operators run signal handlers, and end when a handler raises.");
  m.def(
      "take_raised", [] { return std::exchange(raised(), pybind11::none()); },
      "Return, once, the exception with which a signal handler ended an operator; None otherwise.");
}
