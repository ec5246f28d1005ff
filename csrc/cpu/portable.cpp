// Any machine: the compiler's vectors of four.
#include "log_normalizer_kernel.h"

namespace offtower::cpu {
const Kernel& portable_kernel() {
  static const Kernel kernel{"portable", 8, log_normalizer_block<4, 2, 4>};
  return kernel;
}
} // namespace offtower::cpu
