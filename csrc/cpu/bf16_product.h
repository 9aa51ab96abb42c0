// Products of bfloat16 matrices with sums in float32, using the processor's matrix instructions (AMX) where it has
// them. GCC compiles the AMX code into every binary for Linux on x86-64; it is chosen at run time.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/round.h"
#include "cpu/microkernel.h"
#include "cpu/simd.h"

#if MSACORE_HAS_CLONES
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define MSACORE_HAS_AMX 1
#define MSACORE_AMX __attribute__((target("arch=x86-64-v4,amx-tile,amx-bf16")))
#else
#define MSACORE_HAS_AMX 0
#endif

namespace msacore::cpu {

constexpr int64_t kPairDepth = 32;  // depths are padded to multiples of this

// Two bfloat16 numbers that the instructions take together: one at an even depth and one at the next.
using Pair = uint32_t;

// c [m, n] (+)= a [m, depth] · b [depth, n]; m and n are multiples of kPanel, depth is a multiple of kPairDepth. Rows
// of a are contiguous and `row_a` numbers apart. b holds a pair per column for every two depths: panels of kPanel
// columns are `panel_b` pairs apart, and the next two depths follow after `step_b` pairs.
struct PairProduct {
  int64_t m, n, depth;
  const uint16_t* a;
  int64_t row_a;
  const Pair* b;
  int64_t panel_b, step_b;
  float* c;
  int64_t row_c;
  bool add;
};

#if MSACORE_HAS_AMX

// Whether the processor has matrix instructions and the system lets this process use them, which has to be requested.
inline bool has_pair_products() {
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
    if (vector_bytes() != 64 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & kBfloat16) == 0 || (d & kTiles) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
}

// kRows × kColumns blocks of 16 × 16 results, at most two by two.
template <int kRows, int kColumns>
MSACORE_AMX inline __attribute__((always_inline)) void pair_block(const PairProduct& t, int64_t i, int64_t j) {
  const uint16_t* a = t.a + i * t.row_a;
  const Pair* b = t.b + j / kPanel * t.panel_b;
  float* c = t.c + i * t.row_c + j;
  const int64_t a_bytes = t.row_a * 2, b_bytes = t.step_b * 4, c_bytes = t.row_c * 4;
  float* const c_below = c + kPanel * t.row_c;
  if (t.add) {
    _tile_loadd(0, c, c_bytes);
    if (kColumns == 2) _tile_loadd(1, c + kPanel, c_bytes);
    if (kRows == 2) _tile_loadd(2, c_below, c_bytes);
    if (kRows == 2 && kColumns == 2) _tile_loadd(3, c_below + kPanel, c_bytes);
  } else {
    _tile_zero(0);
    if (kColumns == 2) _tile_zero(1);
    if (kRows == 2) _tile_zero(2);
    if (kRows == 2 && kColumns == 2) _tile_zero(3);
  }
  for (int64_t p = 0; p < t.depth; p += kPairDepth, a += kPairDepth, b += kPairDepth / 2 * t.step_b) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kColumns == 2) {
      _tile_loadd(7, b + t.panel_b, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kRows == 2) {
      _tile_loadd(5, a + kPanel * t.row_a, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (kColumns == 2) _tile_stored(1, c + kPanel, c_bytes);
  if (kRows == 2) _tile_stored(2, c_below, c_bytes);
  if (kRows == 2 && kColumns == 2) _tile_stored(3, c_below + kPanel, c_bytes);
}

MSACORE_AMX inline void pair_product(const PairProduct& t) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  static_assert(sizeof(shapes) == 64, "the layout of the instruction");
  // The intrinsics are inline assembly that does not tell the compiler which memory it reads and writes.
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&shapes);
  int64_t j = 0;
  for (; j + 2 * kPanel <= t.n; j += 2 * kPanel) {
    int64_t i = 0;
    for (; i + 2 * kPanel <= t.m; i += 2 * kPanel) pair_block<2, 2>(t, i, j);
    if (i < t.m) pair_block<1, 2>(t, i, j);
  }
  if (j < t.n) {
    int64_t i = 0;
    for (; i + 2 * kPanel <= t.m; i += 2 * kPanel) pair_block<2, 1>(t, i, j);
    if (i < t.m) pair_block<1, 1>(t, i, j);
  }
  _tile_release();
  __asm__ volatile("" ::: "memory");
}

#else

inline bool has_pair_products() { return false; }

// Computes what the matrix instructions would.
inline void pair_product(const PairProduct& t) {
  const auto value = [](uint32_t high) {
    float out;
    std::memcpy(&out, &high, sizeof(out));
    return out;
  };
  for (int64_t i = 0; i < t.m; ++i)
    for (int64_t j = 0; j < t.n; ++j) {
      float sum = t.add ? t.c[i * t.row_c + j] : 0.0f;
      for (int64_t p = 0; p < t.depth; p += 2) {
        const Pair pair = t.b[j / kPanel * t.panel_b + p / 2 * t.step_b + j % kPanel];
        sum += value(static_cast<uint32_t>(t.a[i * t.row_a + p]) << 16) * value(pair << 16);
        sum += value(static_cast<uint32_t>(t.a[i * t.row_a + p + 1]) << 16) * value(pair & 0xffff0000u);
      }
      t.c[i * t.row_c + j] = sum;
    }
}

#endif

}  // namespace msacore::cpu
