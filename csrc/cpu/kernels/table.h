// The entry of a translation unit in the table of instruction sets.
#pragma once

#include "../instruction_sets.h"
#include "backward.h"
#include "draw.h"
#include "forward.h"
#include "lists.h"
#include "rate.h"
#include "top_k.h"

namespace offtower::cpu {
namespace {

// By arithmetic A on arrays of T.
template <class A, class T>
constexpr Kernels kernels() {
  return {forward<A, T>,   backward<A, T>,  top_k<A, T>,         draw<A, T>,
          list_dots<A, T>, list_sums<A, T>, multiply_add_rate<A>};
}

} // namespace
} // namespace offtower::cpu
