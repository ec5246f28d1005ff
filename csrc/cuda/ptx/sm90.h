// Device operations that sm_90a adds, and the shared-memory descriptors of wgmma.
#pragma once

#include "ptx.h"

#if defined(__CUDACC__)
#include "tma.h"
#include "wgmma.h"
#else
#include "../emulation/sm90.h"
#endif

namespace offtower::cuda {

// Tiles are stored as panels: 128 bytes (64 bfloat16) of each row, the width of the 128-byte swizzle.
// The swizzle stores 16-byte chunk c of row r at chunk c ^ (r % 8), which makes row and column reads
// free of bank conflicts. Its atom is 8 rows, 1,024 bytes, and panels start on that boundary.
constexpr int kPanelBytes = 128;
constexpr int kPanelWidth = 64;
constexpr int kSwizzleAtomBytes = 8 * kPanelBytes;
static_assert(kPanelWidth * sizeof(Bfloat16) == kPanelBytes, "a panel is one swizzle span wide");

OFFTOWER_BOTH constexpr int swizzle_128b(int byte_in_panel) {
  return byte_in_panel ^ (byte_in_panel >> 7 & 7) << 4;
}

// A descriptor encodes (address & 0x3ffff) >> 4: in a cluster, shared addresses carry the CTA's rank in bits 24
// and up. Masked here, once a tile, rather than in every descriptor.
OFFTOWER_DEVICE uint32_t gmma_address(const void* shared) {
  return cast_smem_ptr_to_uint(shared) & 0x3ffffu;
}

// PTX ISA, "Matrix Descriptor Format": bits 0-13 the address, 16-29 the leading and 32-45 the stride byte
// offset, each in units of 16 bytes; bits 62-63 = 1, 128-byte swizzle.
OFFTOWER_BOTH constexpr uint64_t make_gmma_desc(uint32_t address, int leading_bytes,
                                                int stride_bytes) {
  const uint32_t low = (address >> 4) | static_cast<uint32_t>(leading_bytes >> 4) << 16;
  const uint32_t high = static_cast<uint32_t>(stride_bytes >> 4) | 1u << 30;
  return static_cast<uint64_t>(high) << 32 | low;
}

// K-major operand, its k-th block of 16 columns within a panel. The leading offset is unused with swizzle.
OFFTOWER_DEVICE uint64_t k_major_desc(uint32_t first_row, int k) {
  return make_gmma_desc(first_row + static_cast<uint32_t>(k * 32), 16, kSwizzleAtomBytes);
}
// MN-major operand, its k-th block of 16 rows; panels are `panel_stride` bytes apart.
OFFTOWER_DEVICE uint64_t mn_major_desc(uint32_t panel, int k, int panel_stride) {
  return make_gmma_desc(panel + static_cast<uint32_t>(k * 2 * kSwizzleAtomBytes), panel_stride,
                        kSwizzleAtomBytes);
}

} // namespace offtower::cuda
