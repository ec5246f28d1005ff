// AVX2 with fused multiply-add.
#if defined(__x86_64__)
#include "../standard_headers.h"
//
#define OFFTOWER_REGISTER(x) "+v"(x)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "../simd/avx2.h"
#include "../kernels/table.h"

namespace offtower::cpu {
const InstructionSet& avx2() {
  using A = Float32<Avx2>;
  const auto is_supported = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  };
  static const InstructionSet set{"avx2", is_supported, kernels<A, float>(),
                                  kernels<A, Bfloat16>()};
  return set;
}
} // namespace offtower::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
