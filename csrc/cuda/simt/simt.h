// What a kernel may ask of the machine. Kernels are written once over these few operations: nvcc
// compiles them to PTX (device.h), and a host compiler runs them on an emulated thread block
// (../emulation/block.h), so that index arithmetic, fragment layouts, pipelines and barriers are tested
// where there is no GPU.
#pragma once

#include <cstdint>

namespace offtower::cuda {
struct Bfloat16 {
  uint16_t bits;
};
// A float32 that the tensor cores round when they multiply it.
struct Tfloat32 {
  float value;
};
} // namespace offtower::cuda

#if defined(__CUDACC__)
#include "device.h"
#else
#include "../emulation/device.h"
#endif

namespace offtower::cuda {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kNoMass = -14427.0f; // in units of log 2: stands for -inf in p log p

OFFTOWER_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
OFFTOWER_BOTH constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
OFFTOWER_BOTH constexpr int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

OFFTOWER_DEVICE float infinity() { return float_of_bits(0x7f800000u); }

template <class T>
OFFTOWER_DEVICE float to_float(T x);
template <>
OFFTOWER_DEVICE float to_float<float>(float x) {
  return x;
}
template <>
OFFTOWER_DEVICE float to_float<Bfloat16>(Bfloat16 x) {
  return float_of_bits(static_cast<uint32_t>(x.bits) << 16);
}

template <>
OFFTOWER_DEVICE float to_float<Tfloat32>(Tfloat32 x) {
  return x.value;
}

template <class T>
OFFTOWER_DEVICE T from_float(float x);
template <>
OFFTOWER_DEVICE Tfloat32 from_float<Tfloat32>(float x) {
  return Tfloat32{x};
}
template <>
OFFTOWER_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
OFFTOWER_DEVICE Bfloat16 from_float<Bfloat16>(float x) {
  return Bfloat16{static_cast<uint16_t>(pack_bfloat16(x, 0.0f) & 0xffffu)};
}

} // namespace offtower::cuda
