// AVX-512 as servers have had it since 2017: F, BW, DQ, VL.
#if defined(__x86_64__)
#include "../standard_headers.h"
//
#define OFFTOWER_REGISTER(x) "+v"(x)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#include "../simd/avx512.h"
#include "../kernels/table.h"

namespace offtower::cpu {
const InstructionSet& avx512() {
  using A = Float32<Avx512>;
  const auto is_supported = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  };
  static const InstructionSet set{"avx512", is_supported, kernels<A, float>(),
                                  kernels<A, Bfloat16>()};
  return set;
}
} // namespace offtower::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
