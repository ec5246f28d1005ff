// The inner loop of all products: C (M x V registers) += A B, A broadcast value by value, B in
// registers.
//
// M * V accumulators hide the latency of the multiply-adds. Every value of A is used by V of them and
// every register of B by M, so loads are not the limit. The loop runs over the summed dimension, so
// no sum over lanes is needed.
#pragma once

#include "arithmetic.h"

namespace offtower::cpu {
namespace {

// kAcross: the M values of A are adjacent and its steps are `a_stride` apart; otherwise the M rows
// of A are `a_stride` apart and its steps adjacent.
template <class A, int M, int V, bool kAcross>
OFFTOWER_INLINE void multiply(const typename A::Unit* a, int64_t a_stride,
                              const typename A::Unit* b, int64_t b_stride, int64_t depth,
                              typename A::F (&acc)[M][V]) {
  // The M rows that follow, spread over the loop: M short streams at once are more than the
  // hardware's prefetcher follows (at d = 128 without this a quarter of the time is waiting).
  const char* next = reinterpret_cast<const char*>(a + M * a_stride);
  const auto step = [&]() OFFTOWER_INLINE_LAMBDA {
    if constexpr (!kAcross) {
      __builtin_prefetch(next, 0, 3);
      next += M * sizeof(*a);
    }
    typename A::F x[V];
    OFFTOWER_UNROLL
    for (int v = 0; v < V; ++v) x[v] = A::load_unit(b + v * A::kWidth);
    OFFTOWER_UNROLL
    for (int m = 0; m < M; ++m) {
      const auto y = A::broadcast(kAcross ? a + m : a + m * a_stride);
      OFFTOWER_UNROLL
      for (int v = 0; v < V; ++v) A::multiply_add(acc[m][v], y, x[v]);
    }
    b += b_stride;
    a += kAcross ? a_stride : 1;
    __asm__ volatile("" ::: "memory"); // or GCC hoists the next loads, and spills accumulators
  };
  for (; depth >= 4; depth -= 4) {
    OFFTOWER_UNROLL
    for (int i = 0; i < 4; ++i) step();
  }
  for (; depth > 0; --depth) step();
}

// c += A B for M rows and V registers. The tile is summed from zero and then added: two short sums
// have a smaller error than one long one.
template <class A, int M, int V, bool kAcross>
void accumulate_tile(const typename A::Unit* a, int64_t a_stride, const typename A::Unit* b,
                     int64_t b_stride, int64_t depth, float* c, int64_t c_stride) {
  typename A::F acc[M][V];
  OFFTOWER_UNROLL
  for (int m = 0; m < M; ++m) {
    OFFTOWER_UNROLL
    for (int v = 0; v < V; ++v) acc[m][v] = A::set(0.0f);
  }
  multiply<A, M, V, kAcross>(a, a_stride, b, b_stride, depth, acc);
  OFFTOWER_UNROLL
  for (int m = 0; m < M; ++m) {
    OFFTOWER_UNROLL
    for (int v = 0; v < V; ++v) {
      float* p = c + m * c_stride + v * A::kWidth;
      A::store(p, A::add(A::load(p), acc[m][v]));
    }
  }
}

// Memory that is read or written soon, fetched bit by bit between products, which hide the wait for
// it.
struct Prefetched {
  const char* at = nullptr;
  int64_t lines = 0, lines_at_once = 0;

  Prefetched() = default;
  Prefetched(const void* memory, int64_t bytes, int64_t times)
      : at(static_cast<const char*>(memory)), lines(ceil_div(bytes, 64)),
        lines_at_once(ceil_div(lines, max(times, 1))) {}
  void fetch() {
    for (int64_t count = min(lines_at_once, lines); count > 0; --count, --lines, at += 64)
      __builtin_prefetch(at, 0, 2);
  }
};

template <class A, int V, bool kAcross>
void accumulate_columns(const typename A::Unit* a, int64_t a_stride, const typename A::Unit* b,
                        int64_t b_stride, int64_t depth, float* c, int64_t c_stride, int64_t rows,
                        Prefetched& prefetched) {
  const int64_t next = kAcross ? 1 : a_stride; // from one row of A to the next
  int64_t row = 0;
  for (; row + kGroup <= rows; row += kGroup, prefetched.fetch())
    accumulate_tile<A, kGroup, V, kAcross>(a + row * next, a_stride, b, b_stride, depth,
                                           c + row * c_stride, c_stride);
  for (; row + 2 <= rows; row += 2)
    accumulate_tile<A, 2, V, kAcross>(a + row * next, a_stride, b, b_stride, depth,
                                      c + row * c_stride, c_stride);
  if (row < rows)
    accumulate_tile<A, 1, V, kAcross>(a + row * next, a_stride, b, b_stride, depth,
                                      c + row * c_stride, c_stride);
}

// c (rows, registers * kWidth) += A (rows, depth) B (depth, registers). B is in panels of kColumns
// registers, with room for `room` steps each.
template <class A, bool kAcross>
void accumulate(const typename A::Unit* a, int64_t a_stride, const typename A::Unit* b,
                int64_t room, int64_t depth, float* c, int64_t c_stride, int64_t rows,
                int64_t registers, Prefetched prefetched = {}) {
  constexpr int V = A::kColumns, W = A::kWidth;
  for (; registers >= V; registers -= V) {
    accumulate_columns<A, V, kAcross>(a, a_stride, b, V * W, depth, c, c_stride, rows, prefetched);
    b += room * V * W;
    c += V * W;
  }
  if constexpr (V > 3) {
    if (registers == 3)
      accumulate_columns<A, 3, kAcross>(a, a_stride, b, 3 * W, depth, c, c_stride, rows,
                                        prefetched);
    if (registers == 2)
      accumulate_columns<A, 2, kAcross>(a, a_stride, b, 2 * W, depth, c, c_stride, rows,
                                        prefetched);
  }
  if (registers == 1)
    accumulate_columns<A, 1, kAcross>(a, a_stride, b, W, depth, c, c_stride, rows, prefetched);
}

} // namespace
} // namespace offtower::cpu
