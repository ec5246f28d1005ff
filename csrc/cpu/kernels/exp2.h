// Exponentials on registers.
#pragma once

#include "../unroll.h"

namespace offtower::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kNoMass = -1e4f * kLog2E; // stands for -inf in p log p, where 0 * inf would be NaN

// 2^y for y < 127; 0 below -126; NaN for NaN. Error 1.1 ulp.
//
// Adding 1.5 * 2^23 leaves the nearest integer n in the low bits. 2^(y - n) is the polynomial of
// degree 6 of least relative error on [-1/2, 1/2] with value 1 at 0 (Remez; 2e-9, 1.6e-8 with its
// coefficients rounded to float32).
template <class S>
OFFTOWER_INLINE typename S::F exp2(typename S::F y) {
  const auto magic = S::set(12582912.0f);
  const auto shifted = S::add(y, magic);
  const auto r = S::sub(y, S::sub(shifted, magic));
  auto p = S::fma(S::set(1.5353362e-4f), r, S::set(1.3398875e-3f));
  p = S::fma(p, r, S::set(9.6184369e-3f));
  p = S::fma(p, r, S::set(5.5503324e-2f));
  p = S::fma(p, r, S::set(2.4022648e-1f));
  p = S::fma(p, r, S::set(6.9314718e-1f));
  p = S::fma(p, r, S::set(1.0f));
  return S::scale_exponent(p, shifted, y);
}

// (s - anchor) * log2(e): exactly 0 at the anchor, and as exact as s near it, however large both are.
template <class S>
OFFTOWER_INLINE typename S::F below_anchor(typename S::F s, typename S::F anchor) {
  return S::mul(S::sub(s, anchor), S::set(kLog2E));
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
