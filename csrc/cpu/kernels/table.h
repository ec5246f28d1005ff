// The entry of a translation unit in the table of instruction sets.
#pragma once

#include "../instruction_sets.h"
#include "backward.h"
#include "forward.h"
#include "rate.h"
#include "top_k.h"

namespace offtower::cpu {
namespace {

// Float and Half: the arithmetic for float32 and for bfloat16 arrays.
template <class Float, class Half>
InstructionSet instruction_set(const char* name, bool (*runs_here)()) {
  return {
      name,
      runs_here,
      [](const PolicyOperands& o, const ForwardResults& r, Workers& w) {
        return o.dtype == DType::float32 ? forward<Float, float>(o, r, w)
                                         : forward<Half, Bfloat16>(o, r, w);
      },
      [](const BackwardOperands& o, const BackwardResults& r, Workers& w) {
        return o.policy.dtype == DType::float32 ? backward<Float, float>(o, r, w)
                                                : backward<Half, Bfloat16>(o, r, w);
      },
      [](const PolicyOperands& o, const TopKResults& r, Workers& w) {
        return o.dtype == DType::float32 ? top_k<Float, float>(o, r, w)
                                         : top_k<Half, Bfloat16>(o, r, w);
      },
      [](DType dtype) {
        return dtype == DType::float32 ? multiply_add_rate<Float>() : multiply_add_rate<Half>();
      },
  };
}

} // namespace
} // namespace offtower::cpu
