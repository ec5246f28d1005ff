#include "torch_threads.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <cstring>
#include <string>
#endif

namespace offtower::cpu {

#if defined(__linux__)
namespace {

std::atomic<bool> forked{false};
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

ParallelCall find() {
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        std::string& best = *static_cast<std::string*>(found);
        const bool openmp = std::strstr(info->dlpi_name, "libgomp") != nullptr;
        // Of several, the one that lies beside torch.
        if (openmp && (best.empty() || std::strstr(info->dlpi_name, "torch") != nullptr))
          best = info->dlpi_name;
        return 0;
      },
      &path);
  if (path.empty() || watching != 0) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<ParallelCall>(dlsym(library, "GOMP_parallel"));
}

} // namespace

ParallelCall torch_parallel() {
  static const ParallelCall found = find(); // at the first call, when torch is loaded
  return forked ? nullptr : found;
}
#else
ParallelCall torch_parallel() { return nullptr; }
#endif

} // namespace offtower::cpu
