// NEON of aarch64. Included after the target was set, if it is not the compiler's own.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace offtower::cpu {
namespace {

struct Neon {
  static constexpr int kWidth = 4;
  static constexpr int kColumns = 4; // 24 of 32 registers accumulate
  static constexpr bool kHasPowerFactors = false;
  using F = float32x4_t;

  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static F set(float x) { return vdupq_n_f32(x); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F fms(F a, F b, F c) { return vfmaq_f32(vnegq_f32(c), a, b); }
  static void accumulate(F& acc, F a, F b) { acc = vfmaq_f32(acc, a, b); }
  // b where either is NaN, as the x86 instruction has it.
  static F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  // The estimate of 8 bits differs between makers; the division does not.
  static F reciprocal(F x) { return vdivq_f32(set(1.0f), x); }
  static uint32_t above(F a, F b) { return bits(vcgtq_f32(a, b)); }
  static uint32_t not_below_or_equal(F a, F b) { return bits(vmvnq_u32(vcleq_f32(a, b))); }
  static F where_above(F a, F b, F yes, F no) { return vbslq_f32(vcgtq_f32(a, b), yes, no); }
  static uint32_t having(const uint32_t* words, uint32_t bit) { return bits(lanes(words, bit)); }
  static F where_having(const uint32_t* words, uint32_t bit, F yes, F no) {
    return vbslq_f32(lanes(words, bit), yes, no);
  }
  static F scale_exponent(F p, F shifted) { return vreinterpretq_f32_u32(scaled(p, shifted)); }
  static F scale_exponent(F p, F shifted, F x, F least) {
    return vreinterpretq_f32_u32(vbicq_u32(scaled(p, shifted), vcltq_f32(x, least)));
  }

private:
  static uint32x4_t scaled(F p, F shifted) {
    return vaddq_u32(vreinterpretq_u32_f32(p), vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23));
  }
  static uint32x4_t lanes(const uint32_t* words, uint32_t bit) {
    return vtstq_u32(vld1q_u32(words), vdupq_n_u32(bit));
  }
  static uint32_t bits(uint32x4_t mask) {
    const uint32x4_t one_a_lane = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(mask, one_a_lane));
  }
};

} // namespace
} // namespace offtower::cpu
