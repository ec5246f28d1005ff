// Which kernel runs, and on how many threads.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "log_normalizer.h"

namespace offtower::cpu {
namespace {

std::vector<const Kernel*> supported() {
  std::vector<const Kernel*> kernels;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    kernels.push_back(&avx512_kernel());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    kernels.push_back(&avx2_kernel());
#endif
  kernels.push_back(&portable_kernel());
  return kernels;
}

} // namespace

const Kernel& choose_kernel(const char* isa) {
  const std::string wanted = isa;
  std::string names;
  for (const Kernel* kernel : supported()) {
    if (wanted.empty() || wanted == kernel->isa) return *kernel;
    names += (names.empty() ? "" : ", ") + std::string(kernel->isa);
  }
  throw std::invalid_argument("OFFTOWER_CPU_ISA=" + wanted + " is not one that this machine runs (" +
                              names + ")");
}

bool log_normalizer(const LogNormalizerArgs& args, const Kernel& kernel, int threads,
                    bool (*interrupted)()) {
  const int64_t blocks = (args.rows + kernel.lanes - 1) / kernel.lanes;
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  const auto work = [&](bool caller) {
    for (int64_t block; !stop && (block = next.fetch_add(1)) < blocks;) {
      const int64_t begin = block * kernel.lanes;
      kernel.run(args, begin, std::min(begin + kernel.lanes, args.rows));
      if (caller && interrupted()) stop = true;
    }
  };
  // Plain threads for the length of the call: no second pool spins beside torch's, and nothing is
  // left behind for a forked child to inherit.
  std::vector<std::thread> helpers;
  const int64_t wanted = std::min<int64_t>(std::max(threads, 1), blocks);
  for (int64_t i = 1; i < wanted; ++i) helpers.emplace_back(work, false);
  work(true);
  for (std::thread& helper : helpers) helper.join();
  return !stop;
}

} // namespace offtower::cpu
