// AVX-512 with dot products of bfloat16 pairs.
#if defined(__x86_64__)
#include "../standard_headers.h"
//
#define OFFTOWER_REGISTER(x) "+v"(x)
#define OFFTOWER_BFLOAT16_DOT
#if defined(__clang__)
#pragma clang attribute push(                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif
#include "../simd/avx512.h"
#include "../kernels/table.h"

namespace offtower::cpu {
const InstructionSet& avx512bf16() {
  const auto is_supported = [] {
    __builtin_cpu_init();
    return avx512().is_supported() && __builtin_cpu_supports("avx512bf16");
  };
  static const InstructionSet set{"avx512bf16", is_supported, avx512().float32,
                                  kernels<Bfloat16Dot, Bfloat16>()};
  return set;
}
} // namespace offtower::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
