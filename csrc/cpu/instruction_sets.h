// The table of instruction sets, one entry per translation unit under isa/.
#pragma once

#include <vector>

#include "../operands.h"
#include "workers.h"

namespace offtower::cpu {

// The operators for arrays of one dtype. Each returns false if it was interrupted.
struct Kernels {
  bool (*forward)(const PolicyOperands&, const ForwardResults&, Workers&);
  bool (*backward)(const BackwardOperands&, const BackwardResults&, Workers&);
  bool (*top_k)(const PolicyOperands&, const TopKResults&, Workers&);
  bool (*draw)(const PolicyOperands&, const DrawResults&, Workers&);
  bool (*list_dots)(const ListDots&, Workers&);
  bool (*list_sums)(const ListSums&, Workers&);
  // Multiply-adds (counted as two) a second of a loop that touches registers only, one thread.
  double (*multiply_add_rate)();
};

struct InstructionSet {
  const char* name;
  bool (*is_supported)();
  Kernels float32, bfloat16;

  const Kernels& of(DType dtype) const { return dtype == DType::float32 ? float32 : bfloat16; }
};

const InstructionSet& portable();
#if defined(__x86_64__)
const InstructionSet& avx2();
const InstructionSet& avx512();
const InstructionSet& avx512bf16();
#elif defined(__aarch64__)
const InstructionSet& neon();
#endif

// Those that this library was built for, fastest first.
std::vector<const InstructionSet*> built_sets();

// The instruction set called `name`, or for "" the fastest that this machine supports.
// Throws std::invalid_argument for an unknown one or one that this machine lacks.
const InstructionSet& choose_set(const char* name);

} // namespace offtower::cpu
