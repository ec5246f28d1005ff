// Any machine that the compiler knows, aarch64 included.
#include "../standard_headers.h"
//
#include "../simd/portable.h"
#if defined(__aarch64__)
#define OFFTOWER_REGISTER(x) "+w"(x)
#elif defined(__x86_64__)
#define OFFTOWER_REGISTER(x) "+x"(x)
#else
#define OFFTOWER_REGISTER(x) "+m"(x)
#endif
#include "../kernels/table.h"

namespace offtower::cpu {
const InstructionSet& portable() {
  using A = Float32<Portable>;
  static const InstructionSet set{"portable", [] { return true; }, kernels<A, float>(),
                                  kernels<A, Bfloat16>()};
  return set;
}
} // namespace offtower::cpu
