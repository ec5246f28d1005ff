// Loops over registers: without full unrolling the compiler keeps accumulators in memory.
#pragma once

#if defined(__clang__)
#define OFFTOWER_UNROLL _Pragma("clang loop unroll(full)")
#else
#define OFFTOWER_UNROLL _Pragma("GCC unroll 16")
#endif
#define OFFTOWER_INLINE inline __attribute__((always_inline))
#define OFFTOWER_INLINE_LAMBDA __attribute__((always_inline))
