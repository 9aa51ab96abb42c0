// The Python module `_C`. Importing it registers the operators; it binds nothing that takes a tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include <map>
#include <string>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "Compiler, instruction sets, CUDA version and architectures of this build.");
}
