// The two matrix products of a warp: scores = X Y^T, and weighted sums W Y with W in registers.
//
// Accumulators and weights are mma.m16n8 fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16"): with
// g = lane / 4 and t = lane % 4, f[0], f[1] hold row g, columns 2t and 2t + 1; f[2], f[3] row g + 8.
// float32 uses the same layout with fma in place of tensor cores, so that epilogues are written once.
#pragma once

#include "../kernels/params.h"

namespace offtower::cuda {

// Four sigmoids with one reciprocal: 5 special function instructions in place of 8. Results are clamped to
// at least 2^-31 (5e-10), so that the product of the four denominators is finite. One NaN makes all NaN.
OFFTOWER_DEVICE void sigmoid4(float& x0, float& x1, float& x2, float& x3) {
  const auto denominator = [](float x) { return 1.0f + ex2_approx(min_nan(-x * kLog2E, 31.0f)); };
  const float d0 = denominator(x0), d1 = denominator(x1), d2 = denominator(x2),
              d3 = denominator(x3);
  const float low = d0 * d1, high = d2 * d3, r = rcp_approx(low * high);
  const float r_low = r * high, r_high = r * low;
  x0 = r_low * d1;
  x1 = r_low * d0;
  x2 = r_high * d3;
  x3 = r_high * d2;
}

struct alignas(16) Uint4 {
  uint32_t x[4];
};

// Lane t of each four neighboring lanes gets their t-th elements, in the order of the lanes.
OFFTOWER_DEVICE void transpose_quad(uint32_t (&x)[4]) {
  OFFTOWER_UNROLL
  for (int mask = 1; mask < 4; mask *= 2) {
    const bool high = (lane_idx() & mask) != 0;
    OFFTOWER_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((i & mask) != 0) continue;
      const uint32_t low_half = x[i], high_half = x[i + mask];
      const uint32_t received = shfl_xor_sync(high ? low_half : high_half, mask);
      x[i] = high ? received : low_half;
      x[i + mask] = high ? high_half : received;
    }
  }
}

template <int kMmaM, int kMmaN>
OFFTOWER_DEVICE void clear_fragments(float (&s)[kMmaM][kMmaN][4]) {
  OFFTOWER_UNROLL
  for (int m = 0; m < kMmaM; ++m) {
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaN; ++n) {
      OFFTOWER_UNROLL
      for (int e = 0; e < 4; ++e) s[m][n][e] = 0.0f;
    }
  }
}

// One mma over 32 bytes of each row. ldmatrix moves pairs of 16-bit elements, so the fragments of eight
// tf32 elements lie where those of sixteen bfloat16 elements do.
OFFTOWER_DEVICE void mma_step(Bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                              uint32_t b1) {
  mma_m16n8k16_bf16(d, a, b0, b1);
}
OFFTOWER_DEVICE void mma_step(Tfloat32, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                              uint32_t b1) {
  mma_m16n8k8_tf32(d, a, b0, b1);
}
OFFTOWER_DEVICE void ldmatrix_step(Bfloat16, uint32_t (&r)[4], const char* row) {
  ldmatrix_x4(r, row);
}
OFFTOWER_DEVICE void ldmatrix_step(Tfloat32, uint32_t (&r)[4], const char* row) {
  ldmatrix_x4(r, row);
  OFFTOWER_UNROLL
  for (int i = 0; i < 4; ++i) r[i] = cvt_rna_tf32(r[i]);
}

// s = X Y^T over `steps` steps; x is the warp's first row, y the tile, both row-major.
template <class T, int kMmaM, int kMmaN>
OFFTOWER_DEVICE void score_gemm(T type, const char* x, const char* y, int row_pitch, int steps,
                                float (&s)[kMmaM][kMmaN][4]) {
  static_assert(kMmaN % 2 == 0, "one ldmatrix.x4 loads B for two mmas");
  const int lane = lane_idx();
  const char* a_row = x + lane % 16 * row_pitch + lane / 16 * 16;
  const char* b_row = y + (lane % 8 + lane / 16 * 8) * row_pitch + lane / 8 % 2 * 16;
  clear_fragments(s);
  for (int step = 0; step < steps; ++step) {
    uint32_t a[kMmaM][4];
    OFFTOWER_UNROLL
    for (int m = 0; m < kMmaM; ++m)
      ldmatrix_step(type, a[m], a_row + m * kAtomM * row_pitch + step * kStepBytes);
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaN; n += 2) {
      uint32_t b[4];
      ldmatrix_step(type, b, b_row + n * 8 * row_pitch + step * kStepBytes);
      OFFTOWER_UNROLL
      for (int m = 0; m < kMmaM; ++m) {
        mma_step(type, s[m][n], a[m], b[0], b[1]);
        mma_step(type, s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}
struct alignas(16) Float4 {
  float x[4];
};
struct alignas(8) Float2 {
  float x[2];
};

template <int kMmaM, int kMmaN>
OFFTOWER_DEVICE void score_gemm(float, const char* x, const char* y, int row_pitch, int steps,
                                float (&s)[kMmaM][kMmaN][4]) {
  const int g = lane_idx() / 4, t = lane_idx() % 4;
  clear_fragments(s);
  for (int at = 0; at < steps * kStepBytes; at += 16) {
    Float4 a[kMmaM][2];
    OFFTOWER_UNROLL
    for (int m = 0; m < kMmaM; ++m) {
      OFFTOWER_UNROLL
      for (int h = 0; h < 2; ++h)
        a[m][h] = *reinterpret_cast<const Float4*>(x + (m * kAtomM + h * 8 + g) * row_pitch + at);
    }
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaN; ++n) {
      Float4 b[2];
      OFFTOWER_UNROLL
      for (int c = 0; c < 2; ++c)
        b[c] = *reinterpret_cast<const Float4*>(y + (n * 8 + 2 * t + c) * row_pitch + at);
      OFFTOWER_UNROLL
      for (int k = 0; k < 4; ++k) {
        OFFTOWER_UNROLL
        for (int m = 0; m < kMmaM; ++m) {
          OFFTOWER_UNROLL
          for (int e = 0; e < 4; ++e) s[m][n][e] = fma(a[m][e / 2].x[k], b[e % 2].x[k], s[m][n][e]);
        }
      }
    }
  }
}

// sum += W Y: W (16 x block_n) are fragments, y the row-major tile. `scratch` is the warp's; only float32
// uses it.
template <int kMmaN, int kMmaD>
OFFTOWER_DEVICE void weighted_sum_gemm(Bfloat16, const float (&w)[kMmaN][4], const char* y,
                                       int row_pitch, char*, float (&sum)[kMmaD][4]) {
  static_assert(kMmaN % 2 == 0 && kMmaD % 2 == 0,
                "an mma is 16 deep, an ldmatrix.x4 16 columns wide");
  const int lane = lane_idx();
  const char* row = y + lane % 16 * row_pitch + lane / 16 * 16;
  OFFTOWER_UNROLL
  for (int k = 0; k < kMmaN; k += 2) {
    const uint32_t a[4] = {cvt_bf16x2(w[k][0], w[k][1]), cvt_bf16x2(w[k][2], w[k][3]),
                           cvt_bf16x2(w[k + 1][0], w[k + 1][1]),
                           cvt_bf16x2(w[k + 1][2], w[k + 1][3])};
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaD; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, row + k * 8 * row_pitch + n * 16);
      mma_m16n8k16_bf16(sum[n], a, b[0], b[1]);
      mma_m16n8k16_bf16(sum[n + 1], a, b[2], b[3]);
    }
  }
}

// tf32: one mma sums over eight rows of Y. Taking them in the order 0, 2, 4, 6, 1, 3, 5, 7 makes the
// accumulator layout of the weights the layout of operand A, without shuffles.
template <int kMmaN, int kMmaD>
OFFTOWER_DEVICE void weighted_sum_gemm(Tfloat32, const float (&w)[kMmaN][4], const char* y,
                                       int row_pitch, char*, float (&sum)[kMmaD][4]) {
  const int g = lane_idx() / 4, t = lane_idx() % 4;
  OFFTOWER_UNROLL
  for (int k = 0; k < kMmaN; ++k) {
    const uint32_t a[4] = {
        cvt_rna_tf32(float_as_uint(w[k][0])), cvt_rna_tf32(float_as_uint(w[k][2])),
        cvt_rna_tf32(float_as_uint(w[k][1])), cvt_rna_tf32(float_as_uint(w[k][3]))};
    const char* const row = y + (k * 8 + 2 * t) * row_pitch + g * 4;
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaD; ++n) {
      const auto b = [&](int which) {
        return cvt_rna_tf32(*reinterpret_cast<const uint32_t*>(row + which * row_pitch + n * 32));
      };
      mma_m16n8k8_tf32(sum[n], a, b(0), b(1));
    }
  }
}

// Floats from one row of the scratch to the next: 4 more than a multiple of 32 banks.
template <int kMmaN>
constexpr int kScratchPitch = kMmaN * 8 + 4;

template <int kMmaN, int kMmaD>
OFFTOWER_DEVICE void weighted_sum_gemm(float, const float (&w)[kMmaN][4], const char* y,
                                       int row_pitch, char* scratch, float (&sum)[kMmaD][4]) {
  constexpr int P = kScratchPitch<kMmaN>;
  const int g = lane_idx() / 4, t = lane_idx() % 4;
  float* rows = reinterpret_cast<float*>(scratch);
  syncwarp(); // the previous tile's reads are done
  OFFTOWER_UNROLL
  for (int n = 0; n < kMmaN; ++n) {
    OFFTOWER_UNROLL
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<Float2*>(rows + (g + 8 * h) * P + n * 8 + 2 * t) =
          Float2{{w[n][2 * h], w[n][2 * h + 1]}};
  }
  syncwarp();
  for (int k = 0; k < kMmaN * 8; k += 4) {
    const Float4 a[2] = {*reinterpret_cast<const Float4*>(rows + g * P + k),
                         *reinterpret_cast<const Float4*>(rows + (g + 8) * P + k)};
    OFFTOWER_UNROLL
    for (int j = 0; j < 4; ++j) {
      OFFTOWER_UNROLL
      for (int n = 0; n < kMmaD; ++n) {
        const Float2 b =
            *reinterpret_cast<const Float2*>(y + (k + j) * row_pitch + (n * 8 + 2 * t) * 4);
        OFFTOWER_UNROLL
        for (int e = 0; e < 4; ++e) sum[n][e] = fma(a[e / 2].x[j], b.x[e % 2], sum[n][e]);
      }
    }
  }
}

} // namespace offtower::cuda
