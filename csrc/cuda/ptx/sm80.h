// Device operations in CUDA C++ and PTX, sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define OFFTOWER_DEVICE __device__ __forceinline__
#define OFFTOWER_BOTH __host__ __device__ __forceinline__
#define OFFTOWER_UNROLL _Pragma("unroll")

namespace offtower::cuda {

OFFTOWER_DEVICE int thread_idx() { return static_cast<int>(threadIdx.x); }
OFFTOWER_DEVICE int block_dim() { return static_cast<int>(blockDim.x); }
OFFTOWER_DEVICE int64_t block_idx() { return blockIdx.x; }
OFFTOWER_DEVICE int64_t grid_dim() { return gridDim.x; }

OFFTOWER_DEVICE void syncthreads() { __syncthreads(); }
OFFTOWER_DEVICE void syncwarp() { __syncwarp(); }
// Before a branch that lanes of a warp may take differently; for the emulation.
OFFTOWER_DEVICE void mark_divergence() {}
OFFTOWER_DEVICE uint32_t ballot_sync(bool x) { return __ballot_sync(0xffffffffu, x); }
template <class T>
OFFTOWER_DEVICE T shfl_xor_sync(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
OFFTOWER_DEVICE int atomic_add(int* shared, int amount) { return atomicAdd(shared, amount); }
OFFTOWER_DEVICE int count_trailing_zeros(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }

// An opaque copy of x: the compiler cannot hoist what depends on it out of a rare branch, where it would
// occupy registers on every iteration.
OFFTOWER_DEVICE int prevent_hoisting(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
OFFTOWER_DEVICE float uint_as_float(uint32_t bits) { return __uint_as_float(bits); }
OFFTOWER_DEVICE uint32_t float_as_uint(float x) { return __float_as_uint(x); }
OFFTOWER_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Of a NaN and a number: the number.
OFFTOWER_DEVICE float max(float a, float b) { return fmaxf(a, b); }
// Of a NaN and a number: NaN.
OFFTOWER_DEVICE float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// 2^x (relative error 2^-22) and 1/x (1 ulp) on the special function unit.
OFFTOWER_DEVICE float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
OFFTOWER_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// `low` in bits 0-15. PTX names the high half first.
OFFTOWER_DEVICE uint32_t cvt_bf16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

OFFTOWER_DEVICE uint32_t cast_smem_ptr_to_uint(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of 16-bit elements; lane l passes the address of row l % 8 of matrix l / 8.
OFFTOWER_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(cast_smem_ptr_to_uint(row))
               : "memory");
}
OFFTOWER_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(cast_smem_ptr_to_uint(row))
               : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8).
OFFTOWER_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// To nearest, ties away from zero; mma alone would truncate.
OFFTOWER_DEVICE uint32_t cvt_rna_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "r"(bits));
  return rounded;
}

// d (16 x 8) += a (16 x 8) b (8 x 8).
OFFTOWER_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory; zeros where `inside` is false.
OFFTOWER_DEVICE void cp_async_zfill(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(cast_smem_ptr_to_uint(shared)),
               "l"(global), "r"(inside ? 16 : 0)
               : "memory");
}
OFFTOWER_DEVICE void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
OFFTOWER_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

} // namespace offtower::cuda
