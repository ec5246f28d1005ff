// The machine's peak: a loop of the widest multiply-adds on registers alone.
#pragma once

#include "../workers.h"
#include "product.h"

namespace offtower::cpu {
namespace {

template <class A>
double multiply_add_rate() {
  constexpr int64_t kSteps = 10'000'000;
  constexpr int kChains = 12; // enough to hide the latency
  typename A::F acc[kChains];
  OFFTOWER_UNROLL
  for (int i = 0; i < kChains; ++i) {
    acc[i] = A::set(0.0f);
    __asm__ volatile("" : OFFTOWER_REGISTER(acc[i])); // or equal chains would become one
  }
  auto x = A::set(0.0f), y = A::set(0.0f);
  const double begin = seconds();
  for (int64_t step = 0; step < kSteps; ++step) {
    OFFTOWER_UNROLL
    for (int i = 0; i < kChains; ++i) A::multiply_add(acc[i], x, y);
    // Marks the operands as changed; otherwise the compiler would remove the loop.
    __asm__ volatile("" : OFFTOWER_REGISTER(x), OFFTOWER_REGISTER(y));
  }
  const double took = seconds() - begin;
  OFFTOWER_UNROLL
  for (int i = 0; i < kChains; ++i) __asm__ volatile("" : OFFTOWER_REGISTER(acc[i]));
  return 2.0 * A::kPair * A::kWidth * kChains * kSteps / took;
}

} // namespace
} // namespace offtower::cpu
