#include "instruction_sets.h"

#include <stdexcept>
#include <string>

namespace offtower::cpu {

std::vector<const InstructionSet*> built_sets() {
  return {
#if defined(__x86_64__)
      &avx512bf16(), &avx512(), &avx2(),
#elif defined(__aarch64__)
      &neon(),
#endif
      &portable()};
}

const InstructionSet& choose_set(const char* name) {
  const std::string wanted = name;
  std::string names;
  for (const InstructionSet* set : built_sets()) {
    if (!set->is_supported()) continue;
    if (wanted.empty() || wanted == set->name) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("OFFTOWER_CPU_ISA=" + wanted +
                              " is not an instruction set that this machine runs (" + names + ")");
}

} // namespace offtower::cpu
