// Any machine: the compiler's own vectors of four floats.
#pragma once

#include <cstdint>
#include <cstring>

#include "../unroll.h"

namespace offtower::cpu {
namespace {

struct Portable {
  static constexpr int kWidth = 4;   // floats a register
  static constexpr int kColumns = 2; // registers side by side in a product: 12 of 16 accumulate
  static constexpr bool kHasPowerFactors = false; // see Avx512
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16))); // sums of bits wrap; those of int32 must not

  static F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof(x)); }
  static F set(float x) { return F{x, x, x, x}; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static void accumulate(F& acc, F a, F b) { acc = a * b + acc; }
  static F fms(F a, F b, F c) { return a * b - c; }
  // b where either is NaN, as the x86 instruction has it.
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F reciprocal(F x) { return 1.0f / x; }
  // A bit a lane: a > b, and not (a <= b).
  static uint32_t above(F a, F b) { return bits(a > b); }
  static uint32_t not_below_or_equal(F a, F b) { return bits(~(a <= b)); }
  static F where_above(F a, F b, F yes, F no) { return a > b ? yes : no; }
  // The word of the lane has `bit`.
  static uint32_t having(const uint32_t* words, uint32_t bit) { return bits(lanes(words, bit)); }
  static F where_having(const uint32_t* words, uint32_t bit, F yes, F no) {
    return lanes(words, bit) ? yes : no;
  }
  // p * 2^n, n the integer in the low bits of `shifted`; with `x` and `least`, 0 where x < least.
  static F scale_exponent(F p, F shifted) {
    U a, n;
    std::memcpy(&a, &p, sizeof(a));
    std::memcpy(&n, &shifted, sizeof(n));
    a += n << 23;
    std::memcpy(&p, &a, sizeof(p));
    return p;
  }
  static F scale_exponent(F p, F shifted, F x, F least) {
    const F scaled = scale_exponent(p, shifted);
    U a;
    std::memcpy(&a, &scaled, sizeof(a));
    a &= ~reinterpret_cast<U>(x < least);
    std::memcpy(&p, &a, sizeof(p));
    return p;
  }

private:
  static I lanes(const uint32_t* words, uint32_t bit) {
    U word;
    std::memcpy(&word, words, sizeof(word));
    return (word & U{bit, bit, bit, bit}) != U{0, 0, 0, 0};
  }
  static uint32_t bits(I mask) {
    uint32_t found = 0;
    for (int lane = 0; lane < kWidth; ++lane) found |= (mask[lane] & 1u) << lane;
    return found;
  }
};

} // namespace
} // namespace offtower::cpu
