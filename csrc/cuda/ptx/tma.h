// mbarrier and the Tensor Memory Accelerator (TMA), sm_90.
#pragma once

#include <cuda.h>

#include "ptx.h"

namespace offtower::cuda {

using TensorMap = CUtensorMap;

// The warp's number, broadcast so that the compiler treats it as warp-uniform.
OFFTOWER_DEVICE int canonical_warp_idx_sync() {
  return __shfl_sync(0xffffffffu, thread_idx() / 32, 0);
}

OFFTOWER_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cast_smem_ptr_to_uint(barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes initialized barriers visible to the async proxy.
OFFTOWER_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
OFFTOWER_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(cast_smem_ptr_to_uint(barrier))
               : "memory");
}
OFFTOWER_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   cast_smem_ptr_to_uint(barrier)),
               "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has completed.
OFFTOWER_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(cast_smem_ptr_to_uint(barrier)),
      "r"(parity)
      : "memory");
}

// The map's box at (column, row) to shared memory; zeros outside the matrix.
OFFTOWER_DEVICE void tma_load(void* shared, const TensorMap* map, int column, int row,
                              uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(cast_smem_ptr_to_uint(shared)),
      "l"(map), "r"(cast_smem_ptr_to_uint(barrier)), "r"(column), "r"(row)
      : "memory");
}
OFFTOWER_DEVICE void bulk_copy_g2s(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(cast_smem_ptr_to_uint(shared)),
      "l"(global), "r"(bytes), "r"(cast_smem_ptr_to_uint(barrier))
      : "memory");
}

} // namespace offtower::cuda
