// How products are computed: in float32, or with bfloat16 pairs summed in float32.
//
// A product runs over "units" of 32 bits along the summed dimension: one float, or two bfloat16.
// With that, one loop serves both.
#pragma once

#include <cstdint>

#include "element.h"

namespace offtower::cpu {
namespace {

constexpr int kGroup = 6; // items (or rows) computed together with kColumns registers

template <class Simd>
struct Float32 : Simd {
  using Unit = float;
  using F = typename Simd::F;
  static constexpr int kPair = 1; // values a unit

  static F load_unit(const Unit* p) { return Simd::load(p); }
  static F broadcast(const Unit* p) { return Simd::set(*p); }
  // acc += a b of units.
  static void multiply_add(F& acc, F a, F b) { Simd::accumulate(acc, a, b); }

  // The unit of one value; there is no second.
  template <class T>
  static Unit pack(T first, T) {
    return to_float(first);
  }
};

#if defined(OFFTOWER_BFLOAT16_DOT)
struct Bfloat16Dot : Avx512 {
  using Unit = uint32_t;
  static constexpr int kPair = 2;

  static F load_unit(const Unit* p) { return _mm512_loadu_ps(static_cast<const void*>(p)); }
  static F broadcast(const Unit* p) {
    int32_t unit; // of an array of bfloat16, and not always aligned
    std::memcpy(&unit, p, sizeof(unit));
    return _mm512_castsi512_ps(_mm512_set1_epi32(unit));
  }
  static void multiply_add(F& acc, F a, F b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  }
  static Unit pack(Bfloat16 first, Bfloat16 second) {
    return first.bits | static_cast<uint32_t>(second.bits) << 16;
  }
  // 32 values as 16 units of neighbors: (x0, x1), (x2, x3), ... then y.
  static void store_adjacent(Unit* p, F x, F y) {
    _mm512_storeu_ps(static_cast<void*>(p), reinterpret_cast<F>(_mm512_cvtne2ps_pbh(y, x)));
  }
  // 16 units (x_l, y_l) of lane l.
  static void store_pairs(Unit* p, F x, F y) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(static_cast<void*>(p), _mm512_permutexvar_epi16(order, both));
  }
};
#endif

} // namespace
} // namespace offtower::cpu
