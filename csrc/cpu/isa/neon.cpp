// NEON, which every aarch64 machine has.
#if defined(__aarch64__)
#include "../standard_headers.h"
//
#define OFFTOWER_REGISTER(x) "+w"(x)
#include "../simd/neon.h"
#include "../kernels/table.h"

namespace offtower::cpu {
const InstructionSet& neon() {
  using A = Float32<Neon>;
  static const InstructionSet set{"neon", [] { return true; }, kernels<A, float>(),
                                  kernels<A, Bfloat16>()};
  return set;
}
} // namespace offtower::cpu
#endif
