// AVX-512 (F, BW, DQ, VL). Included after the target was set.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace offtower::cpu {
namespace {

struct Avx512 {
  static constexpr int kWidth = 16;
  static constexpr int kColumns = 4; // 24 of 32 registers accumulate
  using F = __m512;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  // acc += a b, in place: GCC moves accumulators between registers otherwise, and spills some.
  static void accumulate(F& acc, F a, F b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  // 14 bits, whose values the architecture fixes, and one Newton step: 2^-23. For 1 <= x <= 2^126.
  static F reciprocal(F x) {
    const F r = _mm512_rcp14_ps(x);
    return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(x, r, set(1.0f)), r);
  }
  static uint32_t above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static uint32_t not_below_or_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
  static F where_above(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
  }
  // A bit a lane: the word of the lane has `bit`.
  static uint32_t having(const uint32_t* words, uint32_t bit) {
    return _mm512_test_epi32_mask(_mm512_loadu_si512(words),
                                  _mm512_set1_epi32(static_cast<int>(bit)));
  }
  static F where_having(const uint32_t* words, uint32_t bit, F yes, F no) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(having(words, bit)), no, yes);
  }
  // 2^y = scale * fraction, by 32 parts of a power of two: y = floor(y) + i / 32 + r, scale =
  // 2^(floor(y) + i / 32), and fraction is the polynomial in r of least relative error on [0, 1/32]
  // with value 1 at 0 (6.6e-8). Adding 1.5 * 2^18 rounded down leaves i in the low bits. e^x takes
  // 8 operations with this, and 12 with scale_exponent.
  static constexpr bool kHasPowerFactors = true;
  static void power_factors(F y, F& scale, F& fraction) {
    alignas(64) static constexpr float kPowers[32] = {
        1.0f,       1.0218972f, 1.0442737f, 1.0671405f, 1.0905077f, 1.1143868f, 1.1387886f,
        1.1637249f, 1.1892071f, 1.2152474f, 1.2418578f, 1.269051f,  1.2968396f, 1.3252367f,
        1.3542556f, 1.38391f,   1.4142135f, 1.4451808f, 1.4768262f, 1.5091645f, 1.5422108f,
        1.5759809f, 1.6104903f, 1.6457555f, 1.6817929f, 1.7186193f, 1.7562522f, 1.7947091f,
        1.8340081f, 1.8741677f, 1.9152066f, 1.9571441f};
    constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const __m512i i = _mm512_castps_si512(_mm512_add_round_ps(y, set(393216.0f), kDown));
    const F r = _mm512_reduce_ps(y, 5 << 4 | kDown); // 5 bits behind the point
    const F part = _mm512_permutex2var_ps(load(kPowers), i, load(kPowers + 16));
    scale = _mm512_scalef_ps(part, y); // by floor(y)
    fraction = fma(fma(set(0.24265265f), r, set(0.69312376f)), r, set(1.0f));
  }
  static F scale_exponent(F p, F shifted) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), n));
  }
  static F scale_exponent(F p, F shifted, F x, F least) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    const __mmask16 there = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(there, _mm512_castps_si512(p), n));
  }
};

} // namespace
} // namespace offtower::cpu
