// Warpgroup matrix multiply-accumulate (wgmma) with bfloat16 operands and float32 accumulators, sm_90a.
//
// Tiles are 64 rows by 32, 64 or 128 columns, 16 deep. Accumulators d[n] hold columns 8 n to 8 n + 7 as an
// mma.m16n8 fragment, 16 rows a warp. They are valid after warpgroup_wait; until then neither they nor
// register operands may be touched.
#pragma once

#include "ptx.h"

namespace offtower::cuda {

// wgmma.fence: orders earlier register accesses before the wgmmas that use those registers.
OFFTOWER_DEVICE void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
OFFTOWER_DEVICE void warpgroup_commit_batch() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
OFFTOWER_DEVICE void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of the registers across this point.
OFFTOWER_DEVICE void warpgroup_fence_operand(float& x) { asm volatile("" : "+f"(x)::"memory"); }
OFFTOWER_DEVICE void warpgroup_fence_operand(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class T, int kCount>
OFFTOWER_DEVICE void warpgroup_fence_operand(T (&fragments)[kCount][4]) {
  OFFTOWER_UNROLL
  for (int n = 0; n < kCount; ++n) {
    OFFTOWER_UNROLL
    for (int e = 0; e < 4; ++e) warpgroup_fence_operand(fragments[n][e]);
  }
}

// setmaxnreg: moves registers from the producer's warpgroup to the consumers'.
template <int kRegisters>
OFFTOWER_DEVICE void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
OFFTOWER_DEVICE void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Operands of the asm statements: `c` is a constraint, REGISTERS the accumulators' places in the text.
#define OFFTOWER_D1(c, n) c(d[n][0]), c(d[n][1]), c(d[n][2]), c(d[n][3])
#define OFFTOWER_D4(c, n) \
  OFFTOWER_D1(c, n), OFFTOWER_D1(c, n + 1), OFFTOWER_D1(c, n + 2), OFFTOWER_D1(c, n + 3)
#define OFFTOWER_D8(c, n) OFFTOWER_D4(c, n), OFFTOWER_D4(c, n + 4)
#define OFFTOWER_D16(c, n) OFFTOWER_D8(c, n), OFFTOWER_D8(c, n + 8)
#define OFFTOWER_REGISTERS4 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define OFFTOWER_REGISTERS8 \
  OFFTOWER_REGISTERS4       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OFFTOWER_REGISTERS16                                                           \
  OFFTOWER_REGISTERS8                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OFFTOWER_WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "

// wgmma_ss_zero: d = A B^T; wgmma_ss: d += A B^T. A and B are K-major in shared memory.
//
// The first declares d as output only (scale-d = 0). As input and output, d's old values would have to be
// moved into place while other wgmmas run, and ptxas would serialize all of them (C7512).
#define OFFTOWER_DEFINE_WGMMA_SS(name, tiles, columns, scale_d, constraint, a_place, b_place) \
  OFFTOWER_DEVICE void name(float (&d)[tiles][4], uint64_t a, uint64_t b) {                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " #scale_d                                 \
                 ", 0;\n" OFFTOWER_WGMMA(columns) "{" OFFTOWER_REGISTERS##tiles               \
                 "}, %" #a_place ", %" #b_place ", p, 1, 1, 0, 0;\n}"                         \
                 : OFFTOWER_D##tiles(constraint, 0)                                           \
                 : "l"(a), "l"(b));                                                           \
  }
OFFTOWER_DEFINE_WGMMA_SS(wgmma_ss_zero, 4, 32, 0, "=f", 16, 17)
OFFTOWER_DEFINE_WGMMA_SS(wgmma_ss_zero, 8, 64, 0, "=f", 32, 33)
OFFTOWER_DEFINE_WGMMA_SS(wgmma_ss_zero, 16, 128, 0, "=f", 64, 65)
OFFTOWER_DEFINE_WGMMA_SS(wgmma_ss, 4, 32, 1, "+f", 16, 17)
OFFTOWER_DEFINE_WGMMA_SS(wgmma_ss, 8, 64, 1, "+f", 32, 33)
OFFTOWER_DEFINE_WGMMA_SS(wgmma_ss, 16, 128, 1, "+f", 64, 65)

// d += A B: A (64 x 16) in registers as mma fragments, B (16 x columns) MN-major in shared memory.
#define OFFTOWER_DEFINE_WGMMA_RS(tiles, columns, a0, a1, a2, a3, b_place)                    \
  OFFTOWER_DEVICE void wgmma_rs(float (&d)[tiles][4], const uint32_t (&a)[4], uint64_t b) {  \
    asm volatile(OFFTOWER_WGMMA(columns) "{" OFFTOWER_REGISTERS##tiles                       \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_place ", 1, 1, 1, 1;\n" \
                 : OFFTOWER_D##tiles("+f", 0)                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                      \
  }
OFFTOWER_DEFINE_WGMMA_RS(8, 64, 32, 33, 34, 35, 36)
OFFTOWER_DEFINE_WGMMA_RS(16, 128, 64, 65, 66, 67, 68)

#undef OFFTOWER_DEFINE_WGMMA_SS
#undef OFFTOWER_DEFINE_WGMMA_RS

} // namespace offtower::cuda
