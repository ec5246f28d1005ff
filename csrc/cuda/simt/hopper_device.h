// What sm_90a adds: the copy engine, barriers in shared memory that count its bytes, and products of
// a warpgroup.
#pragma once

#include <cuda.h>

#include "wgmma.h"

namespace offtower::cuda {

using TensorMap = CUtensorMap;

// Tells the compiler that all lanes have the same number, so that it keeps it once.
OFFTOWER_DEVICE int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

OFFTOWER_DEVICE void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes new barriers known to the copy engine.
OFFTOWER_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
OFFTOWER_DEVICE void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and has the barrier wait for as many bytes of copies too.
OFFTOWER_DEVICE void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity is over.
OFFTOWER_DEVICE void wait_barrier(uint64_t* barrier, int parity) {
  asm volatile("{\n"
               ".reg .pred done;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@done bra over;\n"
               "bra again;\n"
               "over:\n"
               "}" ::"r"(shared_address(barrier)),
               "r"(parity)
               : "memory");
}

// A box of the map's matrix, from (column, row) on, to shared memory; zeros beyond the matrix.
OFFTOWER_DEVICE void copy_box(void* shared, const TensorMap* map, int column, int row,
                              uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
               "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
               : "memory");
}
OFFTOWER_DEVICE void copy_bytes(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                   "r"(shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Orders registers that were written before the products that read or add to them.
OFFTOWER_DEVICE void before_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
OFFTOWER_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
OFFTOWER_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// Keeps the compiler from touching results of products before they are waited for.
template <int kTiles>
OFFTOWER_DEVICE void pin(float (&d)[kTiles][4]) {
  OFFTOWER_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    OFFTOWER_UNROLL
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[n][e])::"memory");
  }
}
template <int kSteps>
OFFTOWER_DEVICE void pin(uint32_t (&a)[kSteps][4]) {
  OFFTOWER_UNROLL
  for (int n = 0; n < kSteps; ++n) {
    OFFTOWER_UNROLL
    for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[n][e])::"memory");
  }
}

// Registers from the producer's warps to the consumers'.
template <int kRegisters>
OFFTOWER_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
OFFTOWER_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

} // namespace offtower::cuda
