// float32 and bfloat16 in memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "../unroll.h"

namespace offtower::cpu {
namespace {

struct Bfloat16 {
  uint16_t bits;
};

OFFTOWER_INLINE float to_float(float x) { return x; }
OFFTOWER_INLINE float to_float(Bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

template <class T>
OFFTOWER_INLINE T from_float(float x);
template <>
OFFTOWER_INLINE float from_float<float>(float x) {
  return x;
}
// To the nearest, ties to even; a NaN stays one. Without a branch, so that loops use registers.
template <>
OFFTOWER_INLINE Bfloat16 from_float<Bfloat16>(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof(wide));
  const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  const uint32_t quiet = (wide >> 16) | 0x40u;
  return Bfloat16{static_cast<uint16_t>((wide & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

OFFTOWER_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
OFFTOWER_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
OFFTOWER_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

} // namespace
} // namespace offtower::cpu
