// From a run-time dtype to a compile-time type.
#pragma once
#include "core/check.h"
#include "core/types.h"

namespace msacore {

template <typename T>
struct TypeTag {
  using type = T;
};

inline ScalarType acc_dtype(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

// Calls body(TypeTag<T>{}) with the C++ type of `type`: dispatch(t, op, [&](auto tag) { using T = typename
// decltype(tag)::type; … }).
template <typename Body>
auto dispatch_floating(ScalarType type, const char* op, Body&& body) {
  switch (type) {
    case ScalarType::Float:
      return body(TypeTag<float>{});
    case ScalarType::Double:
      return body(TypeTag<double>{});
    case ScalarType::Half:
      return body(TypeTag<Half>{});
    case ScalarType::BFloat16:
      return body(TypeTag<BFloat16>{});
    default:
      fail(op, "no kernel for dtype ", dtype_name(type));
  }
}

}  // namespace msacore
