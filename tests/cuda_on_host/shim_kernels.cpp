// Kernels that test the shim and the interpreter of PTX (tests/ptx): correct ones, and ones with a planted fault.
// They are called through ctypes; an error is returned as text.
#include "cuda/launch.cuh"
#include "cuda/tile_product.cuh"

namespace msacore::cuda {
namespace {

__global__ void block_reduction_kernel(const float* __restrict__ in, float* __restrict__ out, int n) {
  float sum = 0, most = -INFINITY;
  for (int i = thread_in_block(); i < n; i += threads_in_block()) {
    sum += in[i];
    most = fmaxf(most, in[i]);
  }
  sum = block_sum(sum);
  most = block_reduce(most, Max{}, -INFINITY);
  if (thread_in_block() == 0) {
    out[0] = sum;
    out[1] = most;
  }
}

__global__ void scan_kernel(const int* __restrict__ in, int* __restrict__ out, int* __restrict__ total) {
  int sum = 0;
  out[thread_in_block()] = block_exclusive_scan(in[thread_in_block()], sum);
  if (thread_in_block() == 0) *total = sum;
}

// Block (32, 8) transposes a 32x32 tile through shared memory. `Barrier` false is the planted fault.
template <bool Barrier>
__global__ void transpose_kernel(const float* __restrict__ in, float* __restrict__ out, int n) {
  MSACORE_SHARED(tile, float[32][33]);
  for (int i = threadIdx.y; i < 32; i += 8) {
    const int row = blockIdx.y * 32 + i, column = blockIdx.x * 32 + threadIdx.x;
    if (row < n && column < n) tile[i][threadIdx.x] = in[row * n + column];
  }
  if constexpr (Barrier) __syncthreads();
  for (int i = threadIdx.y; i < 32; i += 8) {
    const int row = blockIdx.x * 32 + i, column = blockIdx.y * 32 + threadIdx.x;
    if (row < n && column < n) out[row * n + column] = tile[threadIdx.x][i];
  }
}

// One warp, C [16, 8] = A [16, k] · B [k, 8], k a multiple of 16; cp.async copies the tiles, two groups in flight.
// `Wait` false is the planted fault.
template <typename T, bool Wait>
__global__ void mma_kernel(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ out, int k) {
  auto* a_tile = dynamic_shared<T>();  // [2][16][16]
  T* b_tile = a_tile + 2 * 16 * 16;    // [2][16][8]
  const int lane = lane_id();
  const auto fetch = [&](int step) {
    T* to = a_tile + step % 2 * 256;
    async_copy16(to + lane / 2 * 16 + lane % 2 * 8, a + lane / 2 * k + step * 16 + lane % 2 * 8);
    T* to_b = b_tile + step % 2 * 128;
    if (lane < 16) async_copy16(to_b + lane * 8, b + (step * 16 + lane) * 8);
    async_commit();
  };
  float c[4] = {};
  fetch(0);
  for (int step = 0; step < k / 16; ++step) {
    if (step + 1 < k / 16) {
      fetch(step + 1);
    } else {
      async_commit();
    }
    if constexpr (Wait) async_wait<1>();
    __syncwarp();
    uint32_t fa[4], fb4[4];
    load_matrices(fa, a_tile + step % 2 * 256 + lane % 16 * 16 + lane / 16 * 8);
    load_matrices<true>(fb4, b_tile + step % 2 * 128 + lane % 16 * 8);
    const uint32_t fb[2] = {fb4[0], fb4[1]};
    mma16<T>(c, fa, fb);
    __syncwarp();
  }
  for (int i = 0; i < 4; ++i) out[mma_row(i) * 8 + mma_column(i)] = c[i];
}

// The same product on float32 operands, k a multiple of 8.
__global__ void mma_float_kernel(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ out,
                                 int k) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  float c[4] = {};
  for (int k0 = 0; k0 < k; k0 += 8) {
    const float fa[4] = {a[g * k + k0 + t], a[(g + 8) * k + k0 + t], a[g * k + k0 + t + 4],
                         a[(g + 8) * k + k0 + t + 4]};
    const float fb[2] = {b[(k0 + t) * 8 + g], b[(k0 + t + 4) * 8 + g]};
    mma_float(c, fa, fb);
  }
  for (int i = 0; i < 4; ++i) out[mma_row(i) * 8 + mma_column(i)] = c[i];
}

// C [64, 64] = A · Bᵀ of a [64, k] and b [64, k], k a multiple of 8.
template <typename T>
__global__ void tile_product_kernel(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ out, int k) {
  TileSums<float> c;
  clear(c);
  add_tile_product<true, true>(c, Matrix<T>{a, k, kTile, k}, Matrix<T>{b, k, kTile, k}, k);
  for_neighbours(c, [&](int i, int j, float first, float second) {
    out[i * kTile + j] = first;
    out[i * kTile + j + 1] = second;
  });
}

__global__ void votes_and_atomics_kernel(int* __restrict__ out) {
  const int i = thread_in_block();
  const unsigned odd = __ballot_sync(kAllLanes, i % 2);
  if (i % 2) {
    if (__shfl_sync(odd, i, 1) == 1 + warp_id() * kWarp) atomicAdd(out, 1);
  }
  atomicMax(out + 1, i);
  const int threads = __syncthreads_count(1);
  if (i == 0) out[2] = threads;
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_return_kernel(float* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void wrong_mask_kernel(int* out) {
  if (lane_id() < 16) out[lane_id()] = __shfl_xor_sync(kAllLanes, lane_id(), 1);
}

__global__ void stray_lane_kernel(int* out) {
  if (lane_id() < 16) out[lane_id()] = __shfl_sync(0xffffu, lane_id(), 20);
}

__global__ void shared_overrun_kernel(float* out) {
  MSACORE_SHARED(tile, float[32]);
  volatile float* slot = tile + threadIdx.x + 1;  // so that no compiler removes the access
  *slot = 1;
  out[threadIdx.x] = *slot;
}

__global__ void dynamic_overrun_kernel(float* out) {
  float* slot = dynamic_shared<float>() + threadIdx.x + 1;
  *slot = 1;
  out[threadIdx.x] = *slot;
}

__global__ void global_overrun_kernel(float* out, int n) {
  if (threadIdx.x <= static_cast<unsigned>(n)) out[threadIdx.x] = 1;
}

__global__ void misaligned_kernel(const float* in, float* out) { store(out, load<4>(in + 1)); }

// Reads what another lane of the warp stored, with a __syncwarp in between or with nothing.
template <bool Sync>
__global__ void neighbour_kernel(int* __restrict__ out) {
  MSACORE_SHARED(values, int[32]);
  volatile int* const slots = values;
  slots[threadIdx.x] = static_cast<int>(threadIdx.x);
  if constexpr (Sync) __syncwarp();
  out[threadIdx.x] = slots[31 - threadIdx.x];
}

__global__ void unwritten_kernel(int* __restrict__ out) {
  MSACORE_SHARED(values, int[64]);
  volatile int* const slots = values;
  slots[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = slots[threadIdx.x + 1];
}

char message[4096];

template <typename... P, typename... A>
const char* attempt(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... args) {
  try {
    launch(kernel, grid, block, shared, nullptr, args...);
    return "";
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
    return message;
  }
}

}  // namespace
}  // namespace msacore::cuda

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

using namespace msacore;
using namespace msacore::cuda;

EXPORT block_reduction(const float* in, float* out, int n) {
  return attempt(block_reduction_kernel, 1, 96, 0, in, out, n);
}
EXPORT scan(const int* in, int* out, int* total, int n) { return attempt(scan_kernel, 1, n, 0, in, out, total); }
EXPORT transpose(const float* in, float* out, int n, int barrier) {
  const unsigned blocks = (n + 31) / 32;
  return attempt(barrier ? transpose_kernel<true> : transpose_kernel<false>, dim3(blocks, blocks), dim3(32, 8), 0, in,
                 out, n);
}
EXPORT mma_half(const Half* a, const Half* b, float* out, int k, int wait) {
  return attempt(wait ? mma_kernel<Half, true> : mma_kernel<Half, false>, 1, 32, 2 * 384 * sizeof(Half), a, b, out, k);
}
EXPORT mma_bfloat16(const BFloat16* a, const BFloat16* b, float* out, int k, int wait) {
  return attempt(wait ? mma_kernel<BFloat16, true> : mma_kernel<BFloat16, false>, 1, 32, 2 * 384 * sizeof(BFloat16), a,
                 b, out, k);
}
EXPORT mma_float32(const float* a, const float* b, float* out, int k) {
  return attempt(mma_float_kernel, 1, 32, 0, a, b, out, k);
}
EXPORT tile_product_float32(const float* a, const float* b, float* out, int k) {
  return attempt(tile_product_kernel<float>, 1, kTileThreads, kTileBytes<float, float, float, true, true>, a, b, out,
                 k);
}
EXPORT tile_product_half(const Half* a, const Half* b, float* out, int k) {
  return attempt(tile_product_kernel<Half>, 1, kTileThreads, kTileBytes<Half, Half, float, true, true>, a, b, out, k);
}
EXPORT votes_and_atomics(int* out, int threads) { return attempt(votes_and_atomics_kernel, 1, threads, 0, out); }
EXPORT divergent_barrier() { return attempt(divergent_barrier_kernel, 1, 64, 0); }
EXPORT early_return(float* out) { return attempt(early_return_kernel, 1, 64, 0, out); }
EXPORT wrong_mask(int* out) { return attempt(wrong_mask_kernel, 1, 32, 0, out); }
EXPORT stray_lane(int* out) { return attempt(stray_lane_kernel, 1, 32, 0, out); }
EXPORT shared_overrun(float* out) { return attempt(shared_overrun_kernel, 1, 32, 0, out); }
EXPORT dynamic_overrun(float* out) { return attempt(dynamic_overrun_kernel, 1, 32, 32 * sizeof(float), out); }
EXPORT global_overrun(float* out, int n) { return attempt(global_overrun_kernel, 1, n + 1, 0, out, n); }
EXPORT misaligned(const float* in, float* out) { return attempt(misaligned_kernel, 1, 1, 0, in, out); }
EXPORT neighbour(int* out, int sync) {
  return attempt(sync ? neighbour_kernel<true> : neighbour_kernel<false>, 1, 32, 0, out);
}
EXPORT unwritten(int* out) { return attempt(unwritten_kernel, 1, 32, 0, out); }
EXPORT too_much_shared(float* out) { return attempt(dynamic_overrun_kernel, 1, 32, 200 * 1024, out); }
EXPORT too_many_threads(float* out) { return attempt(dynamic_overrun_kernel, 1, dim3(32, 33), 0, out); }
