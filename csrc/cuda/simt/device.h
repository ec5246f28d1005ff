// The operations of simt.h in CUDA and PTX, for sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define OFFTOWER_DEVICE __device__ __forceinline__
#define OFFTOWER_BOTH __host__ __device__ __forceinline__
#define OFFTOWER_UNROLL _Pragma("unroll")

namespace offtower::cuda {

OFFTOWER_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
OFFTOWER_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
OFFTOWER_DEVICE int64_t block_index() { return blockIdx.x; }
OFFTOWER_DEVICE int64_t block_count() { return gridDim.x; }

OFFTOWER_DEVICE void sync_block() { __syncthreads(); }
OFFTOWER_DEVICE void sync_warp() { __syncwarp(); }
OFFTOWER_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
OFFTOWER_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
OFFTOWER_DEVICE double shuffle_xor(double x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
OFFTOWER_DEVICE int add_to_counter(int* shared, int amount) { return atomicAdd(shared, amount); }
OFFTOWER_DEVICE int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }

// Keeps the compiler from computing what follows from x ahead of time, in registers that others need.
OFFTOWER_DEVICE int only_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
OFFTOWER_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
OFFTOWER_DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }
OFFTOWER_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
OFFTOWER_DEVICE float larger(float a, float b) { return fmaxf(a, b); } // drops a NaN
OFFTOWER_DEVICE float smaller(float a, float b) { // keeps a NaN
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
OFFTOWER_DEVICE double log_of(double x) { return log(x); }
OFFTOWER_DEVICE double exp2_of(double x) { return exp2(x); }

// 2^x and 1/x by the special function unit: relative errors 2^-22 and 1 ulp.
OFFTOWER_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
OFFTOWER_DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats to the nearest bfloat16, the first in the low half.
OFFTOWER_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

OFFTOWER_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
OFFTOWER_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
OFFTOWER_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8), bfloat16 with float32 sums.
OFFTOWER_DEVICE void tensor_multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
               "{%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d (16 x 8) += a (16 x 8) b (8 x 8), float32 rounded to tf32: to nearest, ties away from zero.
OFFTOWER_DEVICE uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "r"(bits));
  return rounded;
}
OFFTOWER_DEVICE void tensor_multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
               "{%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, later; zeros where `inside` is false.
OFFTOWER_DEVICE void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(inside ? 16 : 0)
               : "memory");
}
OFFTOWER_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
OFFTOWER_DEVICE void wait_copies() { // all but the last kLeft groups of this thread
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

} // namespace offtower::cuda
