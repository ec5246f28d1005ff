// The two products of a warp, on fragments of 16 rows by 8 columns.
//
// In every fragment f, with g = lane / 4 and t = lane % 4, f[0], f[1] are row g, columns 2t and 2t + 1,
// and f[2], f[3] are row g + 8. bfloat16 uses the tensor cores; float32 multiplies and adds in float32
// on the same fragments, so that all that follows is written once.
#pragma once

#include "problem.h"

namespace offtower::cuda {

OFFTOWER_DEVICE int lane_index() { return thread_index() % 32; }
OFFTOWER_DEVICE int warp_index() { return thread_index() / 32; }

// Four sigmoids with one reciprocal: the special function unit is what binds. Below 2^-31 they stay
// there, so that the product of four denominators is a number. A NaN spoils all four.
OFFTOWER_DEVICE void to_sigmoids(float& x0, float& x1, float& x2, float& x3) {
  const auto denominator = [](float x) { return 1.0f + fast_exp2(smaller(-x * kLog2E, 31.0f)); };
  const float d0 = denominator(x0), d1 = denominator(x1), d2 = denominator(x2), d3 = denominator(x3);
  const float low = d0 * d1, high = d2 * d3, r = fast_reciprocal(low * high);
  const float r_low = r * high, r_high = r * low;
  x0 = r_low * d1;
  x1 = r_low * d0;
  x2 = r_high * d3;
  x3 = r_high * d2;
}

template <int kFragments, int kTiles>
OFFTOWER_DEVICE void clear(float (&s)[kFragments][kTiles][4]) {
  OFFTOWER_UNROLL
  for (int m = 0; m < kFragments; ++m) {
    OFFTOWER_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      OFFTOWER_UNROLL
      for (int e = 0; e < 4; ++e) s[m][n][e] = 0.0f;
    }
  }
}

// A step of the tensor cores: 32 bytes of a row, whichever numbers are in them. Matrices of 16-bit numbers
// and of half as many 32-bit ones are loaded alike, and lie as the product wants them.
OFFTOWER_DEVICE void multiply_step(Bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  tensor_multiply_add(d, a, b0, b1);
}
OFFTOWER_DEVICE void multiply_step(Tfloat32, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  tensor_multiply_add_tf32(d, a, b0, b1);
}
OFFTOWER_DEVICE void load_step(Bfloat16, uint32_t (&r)[4], const char* row) { load_matrices(r, row); }
OFFTOWER_DEVICE void load_step(Tfloat32, uint32_t (&r)[4], const char* row) {
  load_matrices(r, row);
  OFFTOWER_UNROLL
  for (int i = 0; i < 4; ++i) r[i] = to_tf32(r[i]);
}

// s = X Y^T over `steps` steps: X is the warp's first row, Y the tile, both row-major.
template <class T, int kFragments, int kTiles>
OFFTOWER_DEVICE void tensor_scores(T type, const char* x, const char* y, int row_pitch, int steps,
                            float (&s)[kFragments][kTiles][4]) {
  static_assert(kTiles % 2 == 0, "two tiles are loaded at once");
  const int lane = lane_index();
  const char* a_row = x + lane % 16 * row_pitch + lane / 16 * 16;
  const char* b_row = y + (lane % 8 + lane / 16 * 8) * row_pitch + lane / 8 % 2 * 16;
  clear(s);
  for (int step = 0; step < steps; ++step) {
    uint32_t a[kFragments][4];
    OFFTOWER_UNROLL
    for (int m = 0; m < kFragments; ++m)
      load_step(type, a[m], a_row + m * kWarpRows * row_pitch + step * kStep);
    OFFTOWER_UNROLL
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      load_step(type, b, b_row + n * 8 * row_pitch + step * kStep);
      OFFTOWER_UNROLL
      for (int m = 0; m < kFragments; ++m) {
        multiply_step(type, s[m][n], a[m], b[0], b[1]);
        multiply_step(type, s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}
template <int kFragments, int kTiles>
OFFTOWER_DEVICE void scores(Bfloat16 type, const char* x, const char* y, int row_pitch, int steps,
                            float (&s)[kFragments][kTiles][4]) {
  tensor_scores(type, x, y, row_pitch, steps, s);
}
template <int kFragments, int kTiles>
OFFTOWER_DEVICE void scores(Tfloat32 type, const char* x, const char* y, int row_pitch, int steps,
                            float (&s)[kFragments][kTiles][4]) {
  tensor_scores(type, x, y, row_pitch, steps, s);
}

struct alignas(16) Float4 {
  float x[4];
};
struct alignas(8) Float2 {
  float x[2];
};

template <int kFragments, int kTiles>
OFFTOWER_DEVICE void scores(float, const char* x, const char* y, int row_pitch, int steps,
                            float (&s)[kFragments][kTiles][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  clear(s);
  for (int at = 0; at < steps * kStep; at += 16) {
    Float4 a[kFragments][2];
    OFFTOWER_UNROLL
    for (int m = 0; m < kFragments; ++m) {
      OFFTOWER_UNROLL
      for (int h = 0; h < 2; ++h)
        a[m][h] = *reinterpret_cast<const Float4*>(x + (m * kWarpRows + h * 8 + g) * row_pitch + at);
    }
    OFFTOWER_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      Float4 b[2];
      OFFTOWER_UNROLL
      for (int c = 0; c < 2; ++c)
        b[c] = *reinterpret_cast<const Float4*>(y + (n * 8 + 2 * t + c) * row_pitch + at);
      OFFTOWER_UNROLL
      for (int k = 0; k < 4; ++k) {
        OFFTOWER_UNROLL
        for (int m = 0; m < kFragments; ++m) {
          OFFTOWER_UNROLL
          for (int e = 0; e < 4; ++e)
            s[m][n][e] = fused(a[m][e / 2].x[k], b[e % 2].x[k], s[m][n][e]);
        }
      }
    }
  }
}

// sum += W Y: W (16 x tile) is a warp's fragments of weights, Y the tile, row-major. `scratch`: of the
// warp, unused here.
template <int kTiles, int kWidthTiles>
OFFTOWER_DEVICE void weigh(Bfloat16, const float (&w)[kTiles][4], const char* y, int row_pitch,
                           char*, float (&sum)[kWidthTiles][4]) {
  const int lane = lane_index();
  const char* row = y + lane % 16 * row_pitch + lane / 16 * 16;
  OFFTOWER_UNROLL
  for (int k = 0; k < kTiles; k += 2) {
    const uint32_t a[4] = {pack_bfloat16(w[k][0], w[k][1]), pack_bfloat16(w[k][2], w[k][3]),
                           pack_bfloat16(w[k + 1][0], w[k + 1][1]),
                           pack_bfloat16(w[k + 1][2], w[k + 1][3])};
    OFFTOWER_UNROLL
    for (int n = 0; n < kWidthTiles; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, row + k * 8 * row_pitch + n * 16);
      tensor_multiply_add(sum[n], a, b[0], b[1]);
      tensor_multiply_add(sum[n + 1], a, b[2], b[3]);
    }
  }
}

// tf32: a step sums over eight rows of Y, in the order 0, 2, 4, 6, 1, 3, 5, 7, in which the weights lie in
// their fragments already.
template <int kTiles, int kWidthTiles>
OFFTOWER_DEVICE void weigh(Tfloat32, const float (&w)[kTiles][4], const char* y, int row_pitch,
                           char*, float (&sum)[kWidthTiles][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  OFFTOWER_UNROLL
  for (int k = 0; k < kTiles; ++k) {
    const uint32_t a[4] = {to_tf32(bits_of_float(w[k][0])), to_tf32(bits_of_float(w[k][2])),
                           to_tf32(bits_of_float(w[k][1])), to_tf32(bits_of_float(w[k][3]))};
    const char* const row = y + (k * 8 + 2 * t) * row_pitch + g * 4;
    OFFTOWER_UNROLL
    for (int n = 0; n < kWidthTiles; ++n) {
      const auto b = [&](int which) {
        return to_tf32(*reinterpret_cast<const uint32_t*>(row + which * row_pitch + n * 32));
      };
      tensor_multiply_add_tf32(sum[n], a, b(0), b(1));
    }
  }
}

// Floats from one row of the scratch to the next: rows a bank apart from their neighbours.
template <int kTiles>
constexpr int kScratchPitch = kTiles * 8 + 4;

template <int kTiles, int kWidthTiles>
OFFTOWER_DEVICE void weigh(float, const float (&w)[kTiles][4], const char* y, int row_pitch,
                           char* scratch, float (&sum)[kWidthTiles][4]) {
  constexpr int P = kScratchPitch<kTiles>;
  const int g = lane_index() / 4, t = lane_index() % 4;
  float* rows = reinterpret_cast<float*>(scratch);
  sync_warp(); // the last tile's readers are done
  OFFTOWER_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    OFFTOWER_UNROLL
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<Float2*>(rows + (g + 8 * h) * P + n * 8 + 2 * t) =
          Float2{{w[n][2 * h], w[n][2 * h + 1]}};
  }
  sync_warp();
  for (int k = 0; k < kTiles * 8; k += 4) {
    const Float4 a[2] = {*reinterpret_cast<const Float4*>(rows + g * P + k),
                         *reinterpret_cast<const Float4*>(rows + (g + 8) * P + k)};
    OFFTOWER_UNROLL
    for (int j = 0; j < 4; ++j) {
      OFFTOWER_UNROLL
      for (int n = 0; n < kWidthTiles; ++n) {
        const Float2 b =
            *reinterpret_cast<const Float2*>(y + (k + j) * row_pitch + (n * 8 + 2 * t) * 4);
        OFFTOWER_UNROLL
        for (int e = 0; e < 4; ++e) sum[n][e] = fused(a[e / 2].x[j], b.x[e % 2], sum[n][e]);
      }
    }
  }
}

} // namespace offtower::cuda
