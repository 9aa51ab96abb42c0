// Comparing rows of the pool with centres on the CPU: products in float32 rule out the pairs that cannot matter;
// float64 distances decide the rest.
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "core/round.h"
#include "cpu/microkernel.h"
#include "cpu/parallel.h"
#include "kcenter/kcenter_distance.h"

namespace msacore::kcenter::cpu {
using namespace msacore::cpu;

constexpr int64_t kTileRows = 96, kTileCenters = 128;
constexpr int64_t kDirect = 2;  // up to this many centres the exact distances cost less than the filter

// Centres packed for the filter: panels [d, 16] of 16 centres, zeros where there is no centre, and half() · their
// squared norms.
struct PackedCenters {
  std::vector<float> panels;
  std::vector<double> half_norm;

  PackedCenters(const double* centers, int64_t count, const double* shift, const Filter& f)
      : panels(padded(count) * f.d), half_norm(count) {
    parallel_for(0, padded(count) / kPanel, 16, [&](int64_t first, int64_t last) {
      std::vector<float> rows(kPanel * f.d);
      for (int64_t p = first; p < last; ++p) {
        const int64_t begin = p * kPanel, here = std::min(kPanel, count - begin);
        pack_rows(centers + begin * f.d, nullptr, here, shift, f, rows.data(), half_norm.data() + begin);
        float* panel = panels.data() + begin * f.d;
        for (int64_t i = 0; i < here; ++i)
          for (int64_t j = 0; j < f.d; ++j) panel[j * kPanel + i] = rows[i * f.d + j];
      }
    });
  }
};

// Calls visit(first row, rows, first centre, centres, products, their row stride, half norms of the rows) for every
// tile.
template <typename T, typename First, typename Visit>
void for_each_tile(const T* pool, const int64_t* rows, const Sizes& s, const double* shift, const Filter& f,
                   const PackedCenters& centers, const First& first_center, const Visit& visit) {
  const int64_t tiles = ceil_div(s.rows, kTileRows);
  parallel_for(0, tiles, 1, [&](int64_t b, int64_t e) {
    std::vector<float> tile(kTileRows * s.width), products(kTileRows * kTileCenters);
    std::vector<double> half_norm(kTileRows);
    for (int64_t t = b; t < e; ++t) {
      const int64_t begin = t * kTileRows, count = std::min(kTileRows, s.rows - begin);
      const int64_t first = first_center(begin, count);
      if (first < 0) continue;
      pack_rows(pool, rows + begin, count, shift, f, tile.data(), half_norm.data());
      for (int64_t c = first / kPanel * kPanel; c < s.centers; c += kTileCenters) {
        const int64_t n = std::min(kTileCenters, s.centers - c);
        small_product(Product<float>{padded(count), padded(n), s.width, tile.data(), s.width, 1,
                                     centers.panels.data() + c * s.width, s.width * kPanel, kPanel, products.data(),
                                     kTileCenters, false});
        visit(begin, count, c, n, products.data(), half_norm.data());
      }
    }
  });
}

// The nearest centre so far: of equally near centres the smaller number wins.
struct Nearest {
  double distance;
  int64_t owner;

  __attribute__((always_inline)) void offer(double other, int64_t center) {
    if (other < distance || (other == distance && (owner < 0 || center < owner))) *this = {other, center};
  }
};

// Compares rows that lack few centres, from start[i] to the last, without the filter.
template <typename T>
MSACORE_SIMD void fold_few(const T* pool, const int64_t* rows, const int64_t* start, const double* centers,
                           const Sizes& s, int64_t metric, int64_t begin, int64_t end, double* delta_out,
                           int64_t* owner_out) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = pool + rows[i] * s.width;
    Nearest best{delta_out[i], owner_out[i]};
    for (int64_t j = start[i]; j < s.centers; ++j) {
      const double* c = centers + j * s.width;
      best.offer(metric == kEuclidean ? euclidean_distance(x, c, s.width) : cosine_distance(x, c, s.width), j);
    }
    delta_out[i] = best.distance;
    owner_out[i] = best.owner;
  }
}

template <typename T>
void fold(const T* pool, const int64_t* rows, const int64_t* start, const double* centers, const double* shift,
          const double* delta, const int64_t* owner, const Sizes& s, const Filter& f, double* delta_out,
          int64_t* owner_out) {
  std::copy(delta, delta + s.rows, delta_out);
  std::copy(owner, owner + s.rows, owner_out);
  // Few centres are compared without the filter, so there is nothing to pack.
  const auto first_of_tile = [&](int64_t begin, int64_t count) {
    const int64_t first = *std::min_element(start + begin, start + begin + count);
    if (s.centers - first > kDirect) return first;
    fold_few(pool, rows, start, centers, s, f.metric, begin, begin + count, delta_out, owner_out);
    return int64_t{-1};
  };
  const int64_t first = s.rows ? *std::min_element(start, start + s.rows) : s.centers;
  const int64_t packed_from = s.centers - first > kDirect ? first : s.centers;
  PackedCenters packed(centers + packed_from * s.width, s.centers - packed_from, shift, f);
  const double keep = 1 - f.slack();
  std::vector<float> base(s.centers - packed_from);
  for (size_t j = 0; j < base.size(); ++j) base[j] = static_cast<float>(packed.half_norm[j] * keep);
  const float factor = f.metric == kEuclidean ? 2.0f : 1.0f;

  const auto update = [&](int64_t begin, int64_t count, int64_t c, int64_t n, const float* products,
                          const double* half_norm) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = begin + r, skip = std::max<int64_t>(0, start[i] - packed_from - c);
      if (skip >= n) continue;
      const float *dot = products + r * kTileCenters, *low = base.data() + c;
      Nearest best{delta_out[i], owner_out[i]};
      const auto limit = [&] { return static_cast<float>(f.units(best.distance) + kTiny - half_norm[r] * keep); };
      const float lowest_here = lowest(dot + skip, low + skip, n - skip, factor);
      if (!(lowest_here <= limit())) continue;
      const auto exact = [&](int64_t j) {
        const int64_t center = packed_from + c + j;
        double distance;
        exact_distances(pool + rows[i] * s.width, centers, &center, 1, s.width, f.metric, &distance);
        best.offer(distance, center);
      };
      // The likely nearest centre first: it leaves few others to look at.
      int64_t likely = skip;
      while (likely + 1 < n && low[likely] - factor * dot[likely] > lowest_here) ++likely;
      exact(likely);
      float bound = limit();
      for (int64_t j = skip; j < n; ++j) {
        if (j == likely || low[j] - factor * dot[j] > bound) continue;
        exact(j);
        bound = limit();
      }
      delta_out[i] = best.distance;
      owner_out[i] = best.owner;
    }
  };
  // Tiles count centres from the first packed one.
  const auto first_packed = [&](int64_t begin, int64_t count) {
    const int64_t from = first_of_tile(begin, count);
    return from < 0 ? from : from - packed_from;
  };
  Sizes from_first = s;
  from_first.centers = s.centers - packed_from;
  for_each_tile(pool, rows, from_first, shift, f, packed, first_packed, update);
}

template <typename T>
void count(const T* pool, const int64_t* rows, const double* centers, const double* shift, double radius,
           const Sizes& s, const Filter& f, int64_t* out) {
  std::fill(out, out + s.rows, 0);
  PackedCenters packed(centers, s.centers, shift, f);
  const double below = 1 - f.slack(), above = 1 + f.slack(), reach = f.units(radius);
  std::vector<float> low(s.centers), high(s.centers);
  for (int64_t j = 0; j < s.centers; ++j) {
    low[j] = static_cast<float>(packed.half_norm[j] * below);
    high[j] = static_cast<float>(packed.half_norm[j] * above);
  }
  const float factor = f.metric == kEuclidean ? 2.0f : 1.0f;
  const auto all = [](int64_t, int64_t) { return int64_t{0}; };
  const auto add = [&](int64_t begin, int64_t rows_here, int64_t c, int64_t n, const float* products,
                       const double* half_norm) {
    for (int64_t r = 0; r < rows_here; ++r) {
      const int64_t i = begin + r;
      const float* dot = products + r * kTileCenters;
      const float maybe = static_cast<float>(reach + kTiny - half_norm[r] * below);
      const float surely = static_cast<float>(reach - kTiny - half_norm[r] * above);
      int64_t inside = count_within(dot, high.data() + c, n, factor, surely);
      if (count_within(dot, low.data() + c, n, factor, maybe) != inside) {
        for (int64_t j = 0; j < n; ++j) {
          const bool unclear = low[c + j] - factor * dot[j] <= maybe && !(high[c + j] - factor * dot[j] <= surely);
          if (!unclear) continue;
          const int64_t center = c + j;
          double distance;
          exact_distances(pool + rows[i] * s.width, centers, &center, 1, s.width, f.metric, &distance);
          inside += distance <= radius;
        }
      }
      out[i] += inside;
    }
  };
  for_each_tile(pool, rows, s, shift, f, packed, all, add);
}

}  // namespace msacore::kcenter::cpu
