// AVX2 with fused multiply-add: 12 of 16 registers accumulate.
#if defined(__x86_64__)
// The standard library comes before the target, so that none of its inline functions is compiled
// for a machine that may not be this one.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "log_normalizer.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "log_normalizer_kernel.h"

namespace offtower::cpu {
const Kernel& avx2_kernel() {
  static const Kernel kernel{"avx2", 16, log_normalizer_block<8, 2, 6>};
  return kernel;
}
} // namespace offtower::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
