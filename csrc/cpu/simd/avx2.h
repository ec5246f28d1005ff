// AVX2 with fused multiply-add. Included after the target was set.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace offtower::cpu {
namespace {

struct Avx2 {
  static constexpr int kWidth = 8;
  static constexpr int kColumns = 2; // 12 of 16 registers accumulate
  static constexpr bool kHasPowerFactors = false;
  using F = __m256;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  // acc += a b, in place: GCC moves accumulators between registers otherwise, and spills some.
  static void accumulate(F& acc, F a, F b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
  }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  // rcpps differs between makers; the division does not.
  static F reciprocal(F x) { return _mm256_div_ps(set(1.0f), x); }
  static uint32_t above(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
  static uint32_t not_below_or_equal(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)); }
  static F where_above(F a, F b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
  }
  static uint32_t having(const uint32_t* words, uint32_t bit) { return bits(lanes(words, bit)); }
  static F where_having(const uint32_t* words, uint32_t bit, F yes, F no) {
    return _mm256_blendv_ps(no, yes, lanes(words, bit));
  }
  static F scale_exponent(F p, F shifted) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), n));
  }
  static F scale_exponent(F p, F shifted, F x, F least) {
    return _mm256_and_ps(scale_exponent(p, shifted), _mm256_cmp_ps(x, least, _CMP_NLT_UQ));
  }

private:
  static F lanes(const uint32_t* words, uint32_t bit) {
    const __m256i wanted = _mm256_set1_epi32(static_cast<int>(bit));
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(word, wanted), wanted));
  }
  static uint32_t bits(F mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask)); }
};

} // namespace
} // namespace offtower::cpu
