#include "instruction_sets.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace offtower::cpu {

#if defined(__x86_64__)
namespace {

// Intel's processors that leave bfloat16 to AMX start a vdpbf16ps every 2.2 cycles, which is half
// the rate of float32 multiply-adds (Emerald Rapids); AMD's compute at twice that rate.
bool has_fast_bfloat16_dots() {
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel") || __builtin_cpu_is("cooperlake");
}

} // namespace
#endif

std::vector<const InstructionSet*> built_sets() {
#if defined(__x86_64__)
  const InstructionSet *first = &avx512bf16(), *second = &avx512();
  if (!has_fast_bfloat16_dots()) std::swap(first, second);
#endif
  return {
#if defined(__x86_64__)
      first, second, &avx2(),
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
