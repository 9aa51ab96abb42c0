// The rows of one embedding in bfloat16, as they came, for the matrix instructions: raw rows are multiplied first, and
// the factors of both rows, in float32, turn the products into cosines.
#pragma once
#include <cmath>
#include <type_traits>

#include "contrastive/cpu/tiles.h"
#include "core/types.h"
#include "cpu/bf16_product.h"
#include "cpu/buffer.h"

namespace msacore::contrastive::cpu {
using namespace msacore::cpu;

// The nearest bfloat16, in the low half.
MSACORE_INLINE uint32_t narrowed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

#if MSACORE_HAS_CLONES
typedef Pair Words __attribute__((vector_size(kPanel * sizeof(Pair))));
typedef Pair WordsInMemory __attribute__((vector_size(kPanel * sizeof(Pair)), aligned(sizeof(Pair)), may_alias));

// out ← the transpose of 16 × 16 words. Each of four rounds swaps halves between rows 8, 4, 2 and 1 apart.
MSACORE_INLINE void transpose_words(const Pair* in, int64_t in_stride, Pair* out, int64_t out_stride) {
  Words row[kPanel];
#pragma GCC unroll 16
  for (int i = 0; i < kPanel; ++i) row[i] = *reinterpret_cast<const WordsInMemory*>(in + i * in_stride);
#pragma GCC unroll 4
  for (int apart = kPanel / 2; apart > 0; apart /= 2) {
    Words low, high;
#pragma GCC unroll 16
    for (int k = 0; k < kPanel; ++k) {
      low[k] = k & apart ? kPanel + k - apart : k;
      high[k] = k & apart ? kPanel + k : k + apart;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPanel; ++i) {
      if (i & apart) continue;
      const Words first = row[i], second = row[i + apart];
      row[i] = __builtin_shuffle(first, second, low);
      row[i + apart] = __builtin_shuffle(first, second, high);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kPanel; ++i) *reinterpret_cast<WordsInMemory*>(out + i * out_stride) = row[i];
}
#else
MSACORE_INLINE void transpose_words(const Pair* in, int64_t in_stride, Pair* out, int64_t out_stride) {
  for (int64_t i = 0; i < kPanel; ++i)
    for (int64_t k = 0; k < kPanel; ++k) std::memcpy(out + k * out_stride + i, in + i * in_stride + k, sizeof(Pair));
}
#endif

// panel [depth / 2, kPanel] ← pairs of kPanel rows [depth], their pairs `stride` apart
MSACORE_SIMD inline void pair_panel(const Pair* rows, int64_t stride, int64_t depth, Pair* panel) {
  for (int64_t p = 0; p < depth / 2; p += kPanel) transpose_words(rows + p, stride, panel + p * kPanel, kPanel);
}

// out [width] ← pairs of two rows
MSACORE_SIMD inline void pair_rows(const uint16_t* __restrict__ row, const uint16_t* __restrict__ next, int64_t width,
                                   Pair* __restrict__ out) {
  for (int64_t k = 0; k < width; ++k) out[k] = row[k] | static_cast<Pair>(next[k]) << 16;
}

// s[i][j] ← s[i][j] · row[i] · column[j]
MSACORE_SIMD inline void scale_tile(float* __restrict__ s, int64_t m, int64_t n, const float* __restrict__ row,
                                    const float* __restrict__ column) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) s[i * kTileRow + j] = s[i * kTileRow + j] * row[i] * column[j];
}

// Gradients of cosines in bfloat16 for the products with the two sides of a tile: `rows` [m, kBlock], multiplied by the
// factors of the columns, and `columns` [n, kBlock], multiplied by those of the rows. Zeros up to whole depths.
struct NarrowTile {
  uint16_t rows[kBlock * kBlock];
  Pair pairs[kBlock / 2 * kBlock];    // [m / 2, kBlock], of neighbouring rows
  Pair columns[kBlock * kBlock / 2];  // `pairs` transposed
};

MSACORE_SIMD inline void narrow_tile(const float* __restrict__ s, int64_t m, int64_t n, const float* __restrict__ row,
                                     const float* __restrict__ column, bool both, NarrowTile& out) {
  const int64_t columns = round_up(n, kPairDepth), rows = round_up(m, kPairDepth);
  for (int64_t i = 0; i < m; ++i) {
    const float* __restrict__ from = s + i * kTileRow;
    uint16_t* __restrict__ to = out.rows + i * kBlock;
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<uint16_t>(narrowed(from[j] * column[j]));
    for (int64_t j = n; j < columns; ++j) to[j] = 0;
  }
  if (!both) return;
  for (int64_t i = 0; i < m; i += 2) {
    const float* __restrict__ first = s + i * kTileRow, * __restrict__ second = first + kTileRow;
    Pair* __restrict__ pairs = out.pairs + i / 2 * kBlock;
    const float factor = row[i], next_factor = row[i + 1];
    for (int64_t j = 0; j < n; ++j) pairs[j] = narrowed(first[j] * factor) | narrowed(second[j] * next_factor) << 16;
  }
  for (int64_t i = m; i < rows; i += 2)
    for (int64_t j = 0; j < n; ++j) out.pairs[i / 2 * kBlock + j] = 0;
  for (int64_t i = 0; i < rows / 2; i += kPanel)
    for (int64_t j = 0; j < n; j += kPanel)
      transpose_words(out.pairs + i * kBlock + j, kBlock, out.columns + j * (kBlock / 2) + i, kBlock / 2);
}

class PairRows {
 public:
  PairRows() = default;
  PairRows(int64_t rows, int64_t d)
      : depth_(round_up(d, kPairDepth)),
        width_(padded(d)),
        rows_(round_up(rows, kPairDepth)),
        stride_(depth_ / kPairDepth % 2 ? depth_ : depth_ + kPairDepth),  // an odd number of cache lines, see kTileRow
        raw_(rows_ * stride_),
        panels_(rows_ * depth_ / 2),
        factor_(rows_, 0.0f) {
    std::fill(raw_.get() + (rows_ - kPanel) * stride_, raw_.get() + rows_ * stride_, uint16_t(0));
    std::fill(panels_.get() + (rows_ - kPanel) * depth_ / 2, panels_.get() + rows_ * depth_ / 2, Pair(0));
  }
  explicit operator bool() const { return rows_ > 0; }
  const float* factors() const { return factor_.get(); }

  // Sets row i from x [d], null where the row takes no part. `inverse` is its reciprocal norm: 1 where rows are taken
  // as they are, 0 for a row of zeros.
  void set_row(int64_t i, const BFloat16* x, int64_t d, double inverse, bool normalize) {
    uint16_t* const row = raw_.get() + i * stride_;
    std::fill(row + (inverse == 0 ? 0 : d), row + depth_, uint16_t(0));
    factor_[i] = static_cast<float>(inverse);
    if (inverse == 0) {
      const bool finite = !x || std::isfinite(largest_of(x, d));
      if (!finite) factor_[i] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    std::memcpy(row, x, d * sizeof(*row));
    // The instructions treat subnormal numbers as 0, and factors must be in range of float32.
    constexpr double kFar = 1e12;
    const double largest = normalize ? 1 / inverse : largest_of(x, d);
    if ((largest > 1 / kFar && largest < kFar) || largest == 0 || !std::isfinite(largest)) return;
    const int exponent = std::ilogb(largest);
    for (int64_t k = 0; k < d; ++k)
      row[k] = static_cast<uint16_t>(narrowed(std::ldexp(static_cast<float>(x[k]), -exponent)));
    factor_[i] = static_cast<float>(std::ldexp(inverse, exponent));
  }
  void set_panel(int64_t panel) {
    pair_panel(reinterpret_cast<const Pair*>(raw_.get() + panel * kPanel * stride_), stride_ / 2, depth_,
               panels_.get() + panel * kPanel * depth_ / 2);
  }

  // Pairs of neighbouring rows, by which gradients are multiplied: allocates their memory, which `open` then fills.
  void allocate_pairs() { pairs_ = Buffer<Pair>(rows_ / 2 * width_); }
  int64_t groups() const { return rows_ / kPairDepth; }
  void open(int64_t begin, int64_t end) {
    for (int64_t i = begin * kPairDepth; i < end * kPairDepth; i += 2)
      pair_rows(raw_.get() + i * stride_, raw_.get() + (i + 1) * stride_, width_, pairs_.get() + i / 2 * width_);
  }

  // s [m, kTileRow] ← cosines of rows i … of a with rows j … of b.
  static void similarities(const PairRows& a, const PairRows& b, int64_t i, int64_t j, int64_t m, int64_t n, float* s) {
    pair_product({m, n, a.depth_, a.raw_.get() + i * a.stride_, a.stride_, b.panels_.get() + j * b.depth_ / 2,
                  kPanel * b.depth_ / 2, kPanel, s, kTileRow, false});
    scale_tile(s, m, n, a.factors() + i, b.factors() + j);
  }
  // Adds to the gradients of the rows of a, at `to_a` [m, width], and of b, at `to_b` unless null, from the gradients s
  // of those cosines.
  static void add_gradients(const PairRows& a, const PairRows& b, int64_t i, int64_t j, int64_t m, int64_t n,
                            const float* s, float* to_a, float* to_b) {
    thread_local const Buffer<NarrowTile> narrow(1);
    NarrowTile& tile = *narrow.get();
    narrow_tile(s, m, n, a.factors() + i, b.factors() + j, to_b != nullptr, tile);
    pair_product({m, b.width_, round_up(n, kPairDepth), tile.rows, kBlock, b.pairs_.get() + j / 2 * b.width_, kPanel,
                  b.width_, to_a, a.width_, true});
    if (to_b)
      pair_product({n, a.width_, round_up(m, kPairDepth), reinterpret_cast<const uint16_t*>(tile.columns), kBlock,
                    a.pairs_.get() + i / 2 * a.width_, kPanel, a.width_, to_b, b.width_, true});
  }

 private:
  static double largest_of(const BFloat16* x, int64_t d) {
    double largest = 0;
    for (int64_t k = 0; k < d; ++k) {
      const double magnitude = std::fabs(static_cast<double>(static_cast<float>(x[k])));
      largest = magnitude <= largest ? largest : magnitude;  // a NaN stays
    }
    return largest;
  }

  int64_t depth_ = 0, width_ = 0, rows_ = 0, stride_ = 0;
  Buffer<uint16_t> raw_;  // [rows, stride]
  Buffer<Pair> panels_;   // [rows / kPanel, depth / 2, kPanel]
  Buffer<float> factor_;  // [rows]
  Buffer<Pair> pairs_;    // [rows / 2, width], of neighbouring rows
};

// Whether sides with at least `rows` rows [d] of T go through the matrix instructions.
template <typename T>
bool takes_pairs(int64_t rows, int64_t d) {
  constexpr int64_t kFewRows = 128, kNarrow = 32;  // below these, packing costs what the products save
  return std::is_same_v<T, BFloat16> && rows >= kFewRows && d >= kNarrow && has_pair_products();
}

}  // namespace msacore::contrastive::cpu
