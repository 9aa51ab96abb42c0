// Argument checks. A message names the operator, the argument, what was expected and what was given.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace msacore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "msacore::" << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <typename... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (!ok) fail(op, parts...);
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

// `expected` holds one size per dimension, -1 for any size; `meaning` names the dimensions, such as "[N, d]".
inline void check_shape(const Tensor& t, const char* op, const std::string& name,
                        std::initializer_list<int64_t> expected, const char* meaning) {
  bool ok = t.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (int64_t size : expected) {
    if (!ok) break;
    ok = size < 0 || t.size(i) == size;
    ++i;
  }
  if (ok) return;
  std::ostringstream sizes;
  i = 0;
  for (int64_t size : expected) {
    sizes << (i++ ? ", " : "");
    size < 0 ? sizes << "*" : sizes << size;
  }
  fail(op, "expected `", name, "` to have shape ", meaning, " = [", sizes.str(), "], got ", shape_text(t));
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

inline void check_dtype(const Tensor& t, const char* op, const std::string& name, ScalarType expected) {
  check(t.scalar_type() == expected, op, "expected `", name, "` to have dtype ", dtype_name(expected), ", got ",
        dtype_name(t.scalar_type()));
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline void check_floating(const Tensor& t, const char* op, const std::string& name) {
  check(is_floating(t.scalar_type()), op, "expected `", name, "` to have dtype float16, bfloat16, float32 or float64",
        ", got ", dtype_name(t.scalar_type()));
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device:") + std::to_string(t.get_device_index());
}

// All tensors of a call must be on the device of the first one.
inline void check_device(const Tensor& t, const char* op, const std::string& name, const Tensor& like) {
  check(t.device() == like.device(), op, "expected `", name, "` on ", device_text(like), ", got ", device_text(t));
}

}  // namespace msacore
