// Large fresh arrays in large pages.
#pragma once

#include <cstdint>

namespace offtower::cpu {

// Tells the kernel, where it listens, that an array about to be written whole may have pages of
// 2 MiB. A gradient of 256 MB otherwise takes 65,000 page faults: 45 ms where writing takes 10.
void prefer_huge_pages(void* array, int64_t bytes);

} // namespace offtower::cpu
