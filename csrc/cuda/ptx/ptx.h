// The device operations that the kernels use, under CUDA's, PTX's or CuTe's name.
//
// nvcc takes them from sm80.h and, on sm_90a, from tma.h and wgmma.h. A host compiler takes them from
// ../emulation, which runs a kernel's unchanged source on an emulated thread block: index arithmetic,
// fragment layouts, pipelines and barriers are tested on machines without a GPU.
#pragma once

#include <cstdint>

namespace offtower::cuda {
struct Bfloat16 {
  uint16_t bits;
};
// float32 operands of tf32 matrix products.
struct Tfloat32 {
  float value;
};
} // namespace offtower::cuda

#if defined(__CUDACC__)
#include "sm80.h"
#else
#include "../emulation/sm80.h"
#endif

namespace offtower::cuda {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
// log2(p) is clamped here (-10,000 nats), so that p log p is finite.
constexpr float kLogProbFloor = -14427.0f;

OFFTOWER_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
OFFTOWER_BOTH constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
OFFTOWER_BOTH constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

OFFTOWER_DEVICE int lane_idx() { return thread_idx() % 32; }
OFFTOWER_DEVICE int warp_idx() { return thread_idx() / 32; }

OFFTOWER_DEVICE float infinity() { return uint_as_float(0x7f800000u); }
OFFTOWER_DEVICE float quiet_nan() { return uint_as_float(0x7fc00000u); }

OFFTOWER_DEVICE float to_float(float x) { return x; }
OFFTOWER_DEVICE float to_float(Tfloat32 x) { return x.value; }
OFFTOWER_DEVICE float to_float(Bfloat16 x) {
  return uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

template <class T>
OFFTOWER_DEVICE T from_float(float x) {
  return T{x};
}
template <>
OFFTOWER_DEVICE Bfloat16 from_float<Bfloat16>(float x) {
  return Bfloat16{static_cast<uint16_t>(cvt_bf16x2(x, 0.0f) & 0xffffu)};
}

} // namespace offtower::cuda
