// The kernel itself, included once by each translation unit after it has set its target.
//
// Contexts lie in vector lanes: W lanes a register, V registers side by side, so W * V contexts
// share every broadcast item value and no horizontal sum is ever needed. ITEMS items are computed
// together, which hides the latency of the multiply-adds: ITEMS * V accumulators.
//
// Within a tile of items (max, sum) are float32; tiles merge in float64, so the error does not grow
// with the number of items. The running maximum moves rarely after the first items: the rescaling
// is behind a branch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "log_normalizer.h"

namespace offtower::cpu {
namespace {

constexpr int64_t kTile = 512;

#if defined(__clang__)
#define OFFTOWER_UNROLL _Pragma("clang loop unroll(full)")
#else
#define OFFTOWER_UNROLL _Pragma("GCC unroll 8")
#endif

template <int W>
struct Vector;

#define OFFTOWER_VECTOR(W)                                                                         \
  template <>                                                                                      \
  struct Vector<W> {                                                                               \
    typedef float F __attribute__((vector_size(W * 4)));                                           \
    typedef int32_t I __attribute__((vector_size(W * 4)));                                         \
  };
OFFTOWER_VECTOR(4)
OFFTOWER_VECTOR(8)
OFFTOWER_VECTOR(16)
#undef OFFTOWER_VECTOR

template <int W>
using F = typename Vector<W>::F;
template <int W>
using I = typename Vector<W>::I;

// exp(x) for x <= 0, to 2 ulp; below -87 it is 0 to float32's precision.
// exp(x) = 2^n exp(r), n = round(x / ln 2): adding 1.5 * 2^23 rounds to an integer in the low bits.
template <int W>
inline F<W> exp_negative(F<W> x) {
  const F<W> low = F<W>{} - 87.0f;
  x = x < low ? low : x; // not the other way round: a NaN stays one
  const F<W> shifted = x * 1.44269504088896341f + 12582912.0f;
  const F<W> n = shifted - 12582912.0f;
  F<W> r = x - n * 0.693359375f;
  r = r + n * 2.12194440054690583e-4f; // ln 2 in two parts (Cody and Waite 1980)
  F<W> p = r * (1.0f / 720) + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  I<W> bits, exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  std::memcpy(&bits, &p, sizeof(bits));
  bits = bits + (exponent << 23);
  std::memcpy(&p, &bits, sizeof(p));
  return x == x ? p : x;
}

template <int W>
inline bool any(I<W> mask) {
  int32_t found = 0;
  for (int lane = 0; lane < W; ++lane) found |= mask[lane];
  return found != 0;
}

// (max, sum) of W * V contexts over one tile of items.
template <int W, int V>
struct TileState {
  F<W> top[V];
  F<W> sum[V];
};

template <int W, int V, int ITEMS>
inline void add_items(const float* packed, const float* item, const float* bias, int64_t dim,
                      TileState<W, V>& state) {
  F<W> s[ITEMS][V];
  // Without full unrolling the compiler keeps `s` in memory and stores it after every step.
  OFFTOWER_UNROLL
  for (int i = 0; i < ITEMS; ++i) {
    const F<W> b = F<W>{} + (bias != nullptr ? bias[i] : 0.0f);
    OFFTOWER_UNROLL
    for (int v = 0; v < V; ++v) s[i][v] = b;
  }
  for (int64_t k = 0; k < dim; ++k) {
    F<W> u[V];
    OFFTOWER_UNROLL
    for (int v = 0; v < V; ++v) std::memcpy(&u[v], packed + (k * V + v) * W, sizeof(u[v]));
    OFFTOWER_UNROLL
    for (int i = 0; i < ITEMS; ++i) {
      const F<W> x = F<W>{} + item[i * dim + k];
      OFFTOWER_UNROLL
      for (int v = 0; v < V; ++v) s[i][v] += x * u[v];
    }
  }
  OFFTOWER_UNROLL
  for (int v = 0; v < V; ++v) {
    F<W> top = s[0][v];
    OFFTOWER_UNROLL
    for (int i = 1; i < ITEMS; ++i) top = s[i][v] > top ? s[i][v] : top;
    const I<W> moved = top > state.top[v];
    if (any<W>(moved)) {
      top = moved ? top : state.top[v];
      state.sum[v] *= exp_negative<W>(state.top[v] - top);
      state.top[v] = top;
    }
    F<W> sum = exp_negative<W>(s[0][v] - state.top[v]);
    OFFTOWER_UNROLL
    for (int i = 1; i < ITEMS; ++i) sum += exp_negative<W>(s[i][v] - state.top[v]);
    state.sum[v] += sum;
  }
}

template <int W, int V, int ITEMS>
void log_normalizer_block(const LogNormalizerArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t lanes = W * V;
  std::vector<float> packed(static_cast<size_t>(args.dim * lanes));
  for (int64_t row = begin; row < end; row += lanes) {
    const int64_t count = std::min(lanes, end - row);
    // Lanes beyond the last row repeat it; their results are not stored.
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const float* u = args.context + (row + std::min(lane, count - 1)) * args.dim;
      for (int64_t k = 0; k < args.dim; ++k) packed[static_cast<size_t>(k * lanes + lane)] = u[k];
    }
    double top[lanes], sum[lanes];
    std::fill(top, top + lanes, -std::numeric_limits<double>::infinity());
    std::fill(sum, sum + lanes, 0.0);
    for (int64_t tile = 0; tile < args.items; tile += kTile) {
      const int64_t stop = std::min(tile + kTile, args.items);
      TileState<W, V> state;
      for (int v = 0; v < V; ++v) {
        state.top[v] = F<W>{} - std::numeric_limits<float>::max();
        state.sum[v] = F<W>{};
      }
      int64_t j = tile;
      for (; j + ITEMS <= stop; j += ITEMS)
        add_items<W, V, ITEMS>(packed.data(), args.item + j * args.dim,
                               args.item_bias ? args.item_bias + j : nullptr, args.dim, state);
      for (; j < stop; ++j)
        add_items<W, V, 1>(packed.data(), args.item + j * args.dim,
                           args.item_bias ? args.item_bias + j : nullptr, args.dim, state);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const double t = state.top[lane / W][lane % W], s = state.sum[lane / W][lane % W];
        const double larger = std::max(top[lane], t);
        sum[lane] = sum[lane] * std::exp(top[lane] - larger) + s * std::exp(t - larger);
        top[lane] = larger;
      }
    }
    for (int64_t lane = 0; lane < count; ++lane)
      args.out[row + lane] = static_cast<float>(top[lane] + std::log(sum[lane]));
  }
}

} // namespace
} // namespace offtower::cpu
