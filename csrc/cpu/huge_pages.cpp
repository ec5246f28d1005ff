#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace offtower::cpu {

void prefer_huge_pages(void* array, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(array);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // Advice: where it is refused, pages are small and nothing else changes.
  if (bytes >= (int64_t{16} << 20) && last > first)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)array;
  (void)bytes;
#endif
}

} // namespace offtower::cpu
