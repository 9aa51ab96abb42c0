// cp.async, mma and ldmatrix on the host, with the fragment layouts that cuda/mma.cuh states.
#pragma once

namespace cuda_on_host {

// The copy happens when it is waited for: a read that comes too early sees what was there before.
inline void async_copy(void* to, const void* from, size_t bytes, bool valid) {
  std::vector<std::vector<Copy>>& groups = machine().current().copies;
  if (groups.empty()) groups.emplace_back();
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) {
    machine().fail("cp.async from or to an address that is not a multiple of " + std::to_string(bytes));
  }
  groups.back().push_back({to, from, bytes, valid});
}

inline void async_commit() { machine().current().copies.emplace_back(); }

inline void async_wait(size_t pending) {
  std::vector<std::vector<Copy>>& groups = machine().current().copies;
  while (groups.size() > pending + 1) {  // the last group is open: not committed, not waited for
    for (const Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

template <typename T>
T from_bits(uint32_t pair, int which) {
  const auto half = static_cast<uint16_t>(pair >> (16 * which));
  T value;
  std::memcpy(&value, &half, sizeof half);
  return value;
}

struct Fragments {
  float* c;
  const uint32_t *a, *b;
};

// A factor and its exponent, at least that of its type's smallest normal number; 0 has one that no sum reaches.
struct Factor {
  float value;
  int exponent;
};

constexpr int kNoExponent = -1000;

inline int exponent_of(float x, int least) {
  return x == 0 ? kNoExponent : std::max(static_cast<int>(__float_as_uint(x) >> 23 & 255) - 127, least);
}

// c + Σ left · right of `Count` products as tensor cores add: products are exact; every addend is cut off 24 bits below
// the largest exponent (a product's exponent is the sum of its factors' exponents); what is left is added without
// error, and the sum is cut off to float32. Low bits are lost, always towards zero, as in published measurements of
// chips of compute capability 8.0 (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores, 2021);
// later chips keep one bit more.
template <int Count>
__attribute__((always_inline)) inline float cut_off_sum(float c, const Factor* left, const Factor* right) {
  constexpr int kBits = 24;
  double product[Count], plain = c;
  int top = exponent_of(c, -126);
  for (int k = 0; k < Count; ++k) {
    product[k] = static_cast<double>(left[k].value) * right[k].value;
    plain += product[k];
    top = std::max(top, left[k].exponent + right[k].exponent);
  }
  if (!std::isfinite(plain) || top < kNoExponent / 2) return static_cast<float>(plain);
  const auto power = [](int exponent) { return __longlong_as_double(static_cast<long long>(1023 + exponent) << 52); };
  const double units = power(kBits - top);
  auto sum = static_cast<int64_t>(c * units);
  for (int k = 0; k < Count; ++k) sum += static_cast<int64_t>(product[k] * units);
  const double exact = static_cast<double>(sum) * power(top - kBits);
  const auto nearest = static_cast<float>(exact);
  // Subtracting 1 from its bits is one step towards zero.
  return std::abs(static_cast<double>(nearest)) > std::abs(exact) ? __uint_as_float(__float_as_uint(nearest) - 1)
                                                                  : nearest;
}

// C += A · B for all lanes, half of the K steps at a time; `a(row, k)` and `b(k, column)` read the operands where they
// lie. `Least`: the exponent of the smallest normal number of the factors' type. Tests of products spend most of their
// time here.
template <int K, int Least, typename A, typename B>
__attribute__((optimize("O3"))) void multiply(Fragments* const* lanes, A a, B b) {
  Factor left[16][K], right[8][K];
  const auto factor = [](float value) { return Factor{value, exponent_of(value, Least)}; };
  for (int k = 0; k < K; ++k) {
    for (int row = 0; row < 16; ++row) left[row][k] = factor(a(row, k));
    for (int column = 0; column < 8; ++column) right[column][k] = factor(b(k, column));
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float& c = lanes[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2];
      for (int k = 0; k < K; k += K / 2) c = cut_off_sum<K / 2>(c, left[row] + k, right[column] + k);
    }
  }
}

template <typename T>
void mma16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  Fragments mine{c, a, b};
  machine().collective("mma16", 0xffffffffu, site, mine, [](Fragments* const* lanes) {
    constexpr int kLeast = std::numeric_limits<T>::min_exponent - 1;
    multiply<16, kLeast>(
        lanes,
        [&](int row, int k) -> float {
          return from_bits<T>(lanes[row % 8 * 4 + k % 8 / 2]->a[row / 8 + k / 8 * 2], k % 2);
        },
        [&](int k, int column) -> float { return from_bits<T>(lanes[column * 4 + k % 8 / 2]->b[k / 8], k % 2); });
  });
}

inline uint32_t to_tf32(float value) {
  uint32_t bits = __float_as_uint(value);
  if (std::isfinite(value)) bits += 0x1000u;  // to nearest, ties away from zero
  return bits & 0xffffe000u;
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  Fragments mine{c, a, b};
  // The hardware ignores the low 13 bits.
  const auto value = [](uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); };
  machine().collective("mma_tf32", 0xffffffffu, site, mine, [&](Fragments* const* lanes) {
    multiply<8, -126>(
        lanes, [&](int row, int k) { return value(lanes[row % 8 * 4 + k % 4]->a[row / 8 + k / 4 * 2]); },
        [&](int k, int column) { return value(lanes[column * 4 + k % 4]->b[k / 4]); });
  });
}

template <bool Transposed>
void load_matrices(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  struct Rows {
    uint32_t* r;
    const void* row;
  } mine{r, row};
  if (reinterpret_cast<uintptr_t>(row) % 16) machine().fail("ldmatrix from an address that is not a multiple of 16");
  machine().collective("load_matrices", 0xffffffffu, site, mine, [](Rows* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t values[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(values[i], lanes[8 * matrix + i]->row, sizeof values[i]);
      for (int lane = 0; lane < kWarp; ++lane) {
        const int i = lane / 4, j = 2 * (lane % 4);
        const uint32_t low = Transposed ? values[j][i] : values[i][j],
                       high = Transposed ? values[j + 1][i] : values[i][j + 1];
        lanes[lane]->r[matrix] = low | high << 16;
      }
    }
  });
}

}  // namespace cuda_on_host
