// Exponentials on registers.
#pragma once

#include "../unroll.h"

namespace offtower::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLogProbFloor = -1e4f * kLog2E; // clamps p log p, where 0 * -inf would be NaN

// x = e^x for x < 88, and inf above where S has kHasPowerFactors; 0 below -87.3365, where a result
// would be subnormal; NaN for NaN. Error 1.1 ulp near 0; 3.6 ulp for |x| <= 1 with kHasPowerFactors,
// whose relative error grows as |x| 2^-24, by the rounding of y. kBounded: no x is below that.
//
// With y = x log2(e), instruction sets with kHasPowerFactors compute 2^y. For others, adding
// 1.5 * 2^23 leaves the nearest integer n in the low bits, and one fused
// multiply-add gives y - n without rounding y. 2^(y - n) is the polynomial of degree 6 of least relative
// error on [-1/2, 1/2] with value 1 at 0 (Remez; 2e-9, 1.6e-8 with its coefficients rounded to float32).
// G exponentials are interleaved, because one alone is a chain of dependent steps.
template <class S, int G, bool kBounded = false>
OFFTOWER_INLINE void exponential(typename S::F (&x)[G], float log2e = kLog2E) {
  if constexpr (S::kHasPowerFactors) {
    typename S::F factor[G];
    OFFTOWER_UNROLL
    for (int g = 0; g < G; ++g) S::power_factors(S::mul(x[g], S::set(log2e)), x[g], factor[g]);
    OFFTOWER_UNROLL
    for (int g = 0; g < G; ++g) x[g] = S::mul(x[g], factor[g]);
    return;
  }
  const auto magic = S::set(12582912.0f), scale = S::set(log2e);
  typename S::F shifted[G], r[G], p[G];
  OFFTOWER_UNROLL
  for (int g = 0; g < G; ++g) {
    shifted[g] = S::fma(x[g], scale, magic);
    r[g] = S::fms(x[g], scale, S::sub(shifted[g], magic));
    p[g] = S::fma(S::set(1.5353362e-4f), r[g], S::set(1.3398875e-3f));
  }
  const float coefficients[] = {9.6184369e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.9314718e-1f, 1.0f};
  OFFTOWER_UNROLL
  for (int k = 0; k < 5; ++k) {
    OFFTOWER_UNROLL
    for (int g = 0; g < G; ++g) p[g] = S::fma(p[g], r[g], S::set(coefficients[k]));
  }
  OFFTOWER_UNROLL
  for (int g = 0; g < G; ++g)
    x[g] = kBounded ? S::scale_exponent(p[g], shifted[g])
                    : S::scale_exponent(p[g], shifted[g], x[g], S::set(-87.3365f));
}

template <class S>
OFFTOWER_INLINE typename S::F exponential(typename S::F x) {
  typename S::F one[1] = {x};
  exponential<S, 1>(one);
  return one[0];
}

// sum + e^x_0 + e^x_1 + ..., in this order.
template <class S, int G>
OFFTOWER_INLINE typename S::F add_exponentials(typename S::F (&x)[G], typename S::F sum) {
  if constexpr (S::kHasPowerFactors) {
    typename S::F factor[G];
    OFFTOWER_UNROLL
    for (int g = 0; g < G; ++g) S::power_factors(S::mul(x[g], S::set(kLog2E)), x[g], factor[g]);
    OFFTOWER_UNROLL
    for (int g = 0; g < G; ++g) sum = S::fma(x[g], factor[g], sum);
  } else {
    exponential<S, G>(x);
    OFFTOWER_UNROLL
    for (int g = 0; g < G; ++g) sum = S::add(sum, x[g]);
  }
  return sum;
}

// How many of M exponentials to interleave.
constexpr int interleaved(int m) { return m % 3 == 0 ? 3 : m % 2 == 0 ? 2 : 1; }

// (s - reference_max) * log2(e): 0 at the reference max, and as accurate as s near it, however large
// both are.
template <class S>
OFFTOWER_INLINE typename S::F centered_log2(typename S::F s, typename S::F reference_max) {
  return S::mul(S::sub(s, reference_max), S::set(kLog2E));
}

// z = 1 / (1 + e^-z), to a few ulp, without overflow; NaN for NaN.
template <class S, int G>
OFFTOWER_INLINE void sigmoid(typename S::F (&z)[G]) {
  OFFTOWER_UNROLL
  for (int g = 0; g < G; ++g) z[g] = S::max(S::set(-87.0f), S::min(S::set(87.0f), z[g]));
  exponential<S, G, true>(z, -kLog2E);
  OFFTOWER_UNROLL
  for (int g = 0; g < G; ++g) z[g] = S::reciprocal(S::add(z[g], S::set(1.0f)));
}

} // namespace
} // namespace offtower::cpu
