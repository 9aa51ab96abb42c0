// Run-time choice of the instruction set within one binary.
#pragma once
#include <cstdint>
#include <string>

// Marks a leaf function: the loader picks the clone for the processor. A lambda passed to parallel_for is a function of
// its own and stays baseline, so the marked function takes raw pointers and is called from the lambda.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define MSACORE_SIMD __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define MSACORE_HAS_CLONES 1
#define MSACORE_AVX2 __attribute__((target("arch=x86-64-v3")))
#define MSACORE_AVX512 __attribute__((target("arch=x86-64-v4")))
#else
#define MSACORE_SIMD
#define MSACORE_AVX2
#define MSACORE_AVX512
#define MSACORE_HAS_CLONES 0
#endif

// Inlines a helper into every clone of the leaf that calls it; otherwise the clone would call baseline code.
#define MSACORE_INLINE inline __attribute__((always_inline))

namespace msacore::cpu {

// Width in bytes of this processor's vector registers, for leaf functions compiled once per width (MSACORE_AVX2,
// MSACORE_AVX512) instead of cloned.
inline int vector_bytes() {
#if MSACORE_HAS_CLONES
  static const int bytes = __builtin_cpu_supports("x86-64-v4") ? 64 : __builtin_cpu_supports("x86-64-v3") ? 32 : 16;
  return bytes;
#else
  return 16;
#endif
}

inline std::string simd_compiled() {
  return MSACORE_HAS_CLONES ? "baseline, x86-64-v3 (AVX2), x86-64-v4 (AVX-512)" : "baseline";
}

inline std::string simd_active() {
#if MSACORE_HAS_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
#endif
  return "baseline";
}

}  // namespace msacore::cpu
