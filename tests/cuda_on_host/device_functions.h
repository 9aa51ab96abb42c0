// The device language on the host: qualifiers, vector types, barriers, shuffles, votes, atomics, intrinsics.
// Overloads are CUDA's own, so that what compiles here compiles there.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static const
// A plain `__shared__` could be neither filled with NaN nor bounds-checked: use MSACORE_SHARED of device.cuh instead.
#define __shared__ static_assert(false, "declare shared memory with MSACORE_SHARED");

using cudaStream_t = void*;

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace cuda_on_host {

template <typename T>
struct Exchange {
  T value;
  int source;  // lane to read from
  T result;
};

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, Site site) {
  Exchange<T> mine{value, source, value};
  bool stray = false;
  machine().collective(name, mask, site, mine, [&](Exchange<T>* const* lanes) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!lanes[lane]) continue;
      const Exchange<T>* from = lanes[lanes[lane]->source];
      stray = stray || !from;
      if (from) lanes[lane]->result = from->value;
    }
  });
  if (stray) machine().fail(std::string(name) + " at " + site.text() + " reads a lane outside its mask");
  return mine.result;
}

inline int lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp);
}

template <typename T, typename Op>
T update(T* address, Op op) {
  const T old = *address;
  *address = op(old);
  return old;
}

}  // namespace cuda_on_host

inline void __syncthreads(cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::machine().barrier("__syncthreads", 0, site);
}
inline int __syncthreads_count(int vote, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return cuda_on_host::machine().barrier("__syncthreads_count", vote != 0, site);
}
inline int __syncthreads_or(int vote, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return cuda_on_host::machine().barrier("__syncthreads_or", vote != 0, site) > 0;
}
inline int __syncthreads_and(int vote, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return cuda_on_host::machine().barrier("__syncthreads_and", vote == 0, site) == 0;
}

inline unsigned __ballot_sync(unsigned mask, int vote, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::Exchange<unsigned> mine{vote != 0, 0, 0};
  cuda_on_host::machine().collective("__ballot_sync", mask, site, mine, [](auto* const* lanes) {
    unsigned votes = 0;
    for (int lane = 0; lane < cuda_on_host::kWarp; ++lane) votes |= lanes[lane] ? lanes[lane]->value << lane : 0;
    for (int lane = 0; lane < cuda_on_host::kWarp; ++lane) {
      if (lanes[lane]) lanes[lane]->result = votes;
    }
  });
  return mine.result;
}
inline int __any_sync(unsigned mask, int vote, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return __ballot_sync(mask, vote, site) != 0;
}
inline int __all_sync(unsigned mask, int vote, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return __ballot_sync(mask, vote, site) == mask;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  int nothing = 0;
  cuda_on_host::machine().collective("__syncwarp", mask, site, nothing, [](int* const*) {});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cuda_on_host::Site site = cuda_on_host::Site::here()) {
  const int lane = cuda_on_host::lane();
  return cuda_on_host::shuffle("__shfl_sync", mask, value, lane / width * width + (source & (width - 1)), site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cuda_on_host::Site site = cuda_on_host::Site::here()) {
  const int lane = cuda_on_host::lane(), source = lane - static_cast<int>(delta);
  return cuda_on_host::shuffle("__shfl_up_sync", mask, value, source < lane / width * width ? lane : source, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cuda_on_host::Site site = cuda_on_host::Site::here()) {
  const int lane = cuda_on_host::lane(), source = lane + static_cast<int>(delta);
  return cuda_on_host::shuffle("__shfl_down_sync", mask, value, source >= (lane / width + 1) * width ? lane : source,
                               site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  cuda_on_host::Site site = cuda_on_host::Site::here()) {
  const int lane = cuda_on_host::lane(), source = lane ^ lane_mask;
  return cuda_on_host::shuffle("__shfl_xor_sync", mask, value, source >= (lane / width + 1) * width ? lane : source,
                               site);
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  struct Match {
    T value;
    unsigned same;
  } mine{value, 0};
  cuda_on_host::machine().collective("__match_any_sync", mask, site, mine, [](Match* const* lanes) {
    for (int a = 0; a < cuda_on_host::kWarp; ++a) {
      for (int b = 0; b < cuda_on_host::kWarp; ++b) {
        if (lanes[a] && lanes[b] && lanes[a]->value == lanes[b]->value) lanes[a]->same |= 1u << b;
      }
    }
  });
  return mine.same;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

#define MSACORE_ATOMIC(name, type, expression)                                          \
  inline type name(type* address, type value) {                                         \
    return cuda_on_host::update(address, [=](type old) -> type { return expression; }); \
  }
MSACORE_ATOMIC(atomicAdd, int, old + value)
MSACORE_ATOMIC(atomicAdd, unsigned, old + value)
MSACORE_ATOMIC(atomicAdd, unsigned long long, old + value)
MSACORE_ATOMIC(atomicAdd, float, old + value)
MSACORE_ATOMIC(atomicAdd, double, old + value)
MSACORE_ATOMIC(atomicMax, int, std::max(old, value))
MSACORE_ATOMIC(atomicMax, unsigned, std::max(old, value))
MSACORE_ATOMIC(atomicMax, long long, std::max(old, value))
MSACORE_ATOMIC(atomicMax, unsigned long long, std::max(old, value))
MSACORE_ATOMIC(atomicMin, int, std::min(old, value))
MSACORE_ATOMIC(atomicMin, unsigned, std::min(old, value))
MSACORE_ATOMIC(atomicMin, long long, std::min(old, value))
MSACORE_ATOMIC(atomicMin, unsigned long long, std::min(old, value))
MSACORE_ATOMIC(atomicOr, int, old | value)
MSACORE_ATOMIC(atomicOr, unsigned, old | value)
MSACORE_ATOMIC(atomicOr, unsigned long long, old | value)
MSACORE_ATOMIC(atomicExch, int, (void(old), value))
MSACORE_ATOMIC(atomicExch, unsigned, (void(old), value))
MSACORE_ATOMIC(atomicExch, unsigned long long, (void(old), value))
MSACORE_ATOMIC(atomicExch, float, (void(old), value))
#undef MSACORE_ATOMIC
inline int atomicCAS(int* address, int expected, int value) {
  return cuda_on_host::update(address, [=](int old) { return old == expected ? value : old; });
}
inline unsigned atomicCAS(unsigned* address, unsigned expected, unsigned value) {
  return cuda_on_host::update(address, [=](unsigned old) { return old == expected ? value : old; });
}
inline unsigned long long atomicCAS(unsigned long long* address, unsigned long long expected,
                                    unsigned long long value) {
  return cuda_on_host::update(address, [=](unsigned long long old) { return old == expected ? value : old; });
}

using std::max;
using std::min;
template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64; }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline double rsqrt(double v) { return 1.0 / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline int __float_as_int(float v) { return static_cast<int>(__float_as_uint(v)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline long long __double_as_longlong(double v) {
  long long bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
