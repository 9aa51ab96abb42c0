// Tensor-core products of one warp, C [16, 8] += A [16, k] · B [k, 8], and the loads of their fragments.
//
// Fragments, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16" and ".m16n8k8"):
//
// - c[i]: row g + 8·(i / 2), column 2t + i % 2
//
// - 16-bit, k = 16: a[r]: row g + 8·(r % 2), columns 2t + 8·(r / 2) and the next; b[r]: rows 2t + 8r and the next,
// column g
//
// - tf32, k = 8: a[r]: row g + 8·(r % 2), column t + 4·(r / 2); b[r]: row t + 4r, column g
#pragma once
#include "cuda/device.cuh"

namespace msacore::cuda {

__device__ __forceinline__ int mma_row(int i) { return lane_id() / 4 + 8 * (i / 2); }
__device__ __forceinline__ int mma_column(int i) { return 2 * (lane_id() % 4) + i % 2; }

// T: Half or BFloat16, k = 16. Products are exact, sums float32.
template <typename T>
__device__ __forceinline__ void mma16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  static_assert(sizeof(T) == 2, "mma16 takes Half or BFloat16");
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  cuda_on_host::mma16<T>(c, a, b);
#endif
}

// Bits of the nearest tf32 (10 bits of mantissa, float32's exponent).
__device__ __forceinline__ uint32_t to_tf32(float value) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  return cuda_on_host::to_tf32(value);
#endif
}

// k = 8, operands as bits of tf32.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  cuda_on_host::mma_tf32(c, a, b);
#endif
}

// k = 8 on float32: each operand is split into a tf32 number and a tf32 remainder, and three products keep float32's
// accuracy. An `Exact` operand is tf32 already (16-bit numbers are) and has no remainder.
template <bool ExactA = false, bool ExactB = false>
__device__ __forceinline__ void mma_float(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a_high[i] = ExactA ? __float_as_uint(a[i]) : to_tf32(a[i]);
    a_low[i] = to_tf32(a[i] - __uint_as_float(a_high[i]));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    b_high[i] = ExactB ? __float_as_uint(b[i]) : to_tf32(b[i]);
    b_low[i] = to_tf32(b[i] - __uint_as_float(b_high[i]));
  }
  if constexpr (!ExactA) mma_tf32(c, a_low, b_high);
  if constexpr (!ExactB) mma_tf32(c, a_high, b_low);
  mma_tf32(c, a_high, b_high);
}

// Loads 8x8 matrices of 16-bit elements from shared memory: lane 8m + i gives the address of row i of matrix m (16-byte
// aligned); r[m] gets row lane / 4, columns 2·(lane % 4) and the next. `Transposed`: row and column change places.
template <bool Transposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
#else
  cuda_on_host::load_matrices<Transposed>(r, row);
#endif
}

}  // namespace msacore::cuda
