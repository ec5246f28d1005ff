// Exponentials on registers.
#pragma once

#include "../unroll.h"

namespace offtower::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLogProbFloor = -1e4f * kLog2E; // clamps p log p, where 0 * -inf would be NaN

// y = 2^y for y < 127; 0 below -126; NaN for NaN. Error 1.1 ulp.
//
// Adding 1.5 * 2^23 leaves the nearest integer n in the low bits. 2^(y - n) is the polynomial of
// degree 6 of least relative error on [-1/2, 1/2] with value 1 at 0 (Remez; 2e-9, 1.6e-8 with its
// coefficients rounded to float32). G exponentials are interleaved: one alone is a chain of dependent
// steps, and three fill the pipes (8 % less time than one after the other).
template <class S, int G>
OFFTOWER_INLINE void exp2(typename S::F (&y)[G]) {
  const auto magic = S::set(12582912.0f);
  typename S::F shifted[G], r[G], p[G];
  OFFTOWER_UNROLL
  for (int g = 0; g < G; ++g) {
    shifted[g] = S::add(y[g], magic);
    r[g] = S::sub(y[g], S::sub(shifted[g], magic));
    p[g] = S::fma(S::set(1.5353362e-4f), r[g], S::set(1.3398875e-3f));
  }
  const float coefficients[] = {9.6184369e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.9314718e-1f, 1.0f};
  OFFTOWER_UNROLL
  for (int k = 0; k < 5; ++k) {
    OFFTOWER_UNROLL
    for (int g = 0; g < G; ++g) p[g] = S::fma(p[g], r[g], S::set(coefficients[k]));
  }
  OFFTOWER_UNROLL
  for (int g = 0; g < G; ++g) y[g] = S::scale_exponent(p[g], shifted[g], y[g]);
}

template <class S>
OFFTOWER_INLINE typename S::F exp2(typename S::F y) {
  typename S::F one[1] = {y};
  exp2<S, 1>(one);
  return one[0];
}

// How many of M exponentials to interleave.
constexpr int interleaved(int m) { return m % 3 == 0 ? 3 : m % 2 == 0 ? 2 : 1; }

// (s - reference_max) * log2(e): 0 at the reference max, and as accurate as s near it, however large
// both are.
template <class S>
OFFTOWER_INLINE typename S::F centered_log2(typename S::F s, typename S::F reference_max) {
  return S::mul(S::sub(s, reference_max), S::set(kLog2E));
}

// 1 / (1 + e^-z), to a few ulp, without overflow; NaN for NaN.
template <class S>
OFFTOWER_INLINE typename S::F sigmoid(typename S::F z) {
  auto y = S::mul(z, S::set(-kLog2E));
  y = S::max(S::set(-126.0f), S::min(S::set(125.0f), y));
  return S::reciprocal(S::add(exp2<S>(y), S::set(1.0f)));
}

} // namespace
} // namespace offtower::cpu
