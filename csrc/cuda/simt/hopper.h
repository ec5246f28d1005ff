// What Hopper adds to simt.h, and how its products find their operands in shared memory.
#pragma once

#include "simt.h"

#if defined(__CUDACC__)
#include "hopper_device.h"
#else
#include "../emulation/hopper.h"
#endif

namespace offtower::cuda {

// The copy engine lays a box of 128-byte rows out with the 16-byte pieces of row r at p ^ (r % 8), so
// that both readings of it find different banks. Panels start on 1,024 bytes.
constexpr int kPanelBytes = 128;  // of a row
constexpr int kPanelWidth = 64;   // bfloat16 numbers
constexpr int kEightRows = 8 * kPanelBytes;

OFFTOWER_BOTH constexpr int swizzled(int byte_in_panel) {
  return byte_in_panel ^ (byte_in_panel >> 7 & 7) << 4;
}

// Descriptor of a matrix in shared memory (PTX ISA, "Matrix-descriptor format"): address, two strides,
// all in 16 bytes, and the 128-byte swizzle. Only the low word differs between the steps of a product.
OFFTOWER_BOTH constexpr uint64_t descriptor(uint32_t address, int leading, int stride) {
  const uint32_t low = (address >> 4) | static_cast<uint32_t>(leading >> 4) << 16;
  const uint32_t high = static_cast<uint32_t>(stride >> 4) | 1u << 30;
  return static_cast<uint64_t>(high) << 32 | low;
}

// Rows along the summed dimension: 8 rows are kEightRows apart; `step` of 16 numbers within a panel.
OFFTOWER_DEVICE uint64_t rows_descriptor(uint32_t first_row, int step) {
  return descriptor(first_row + static_cast<uint32_t>(step * 32), 16, kEightRows);
}
// Rows along the columns of the product: its `step` of 16 rows; panels are `panel_stride` apart.
OFFTOWER_DEVICE uint64_t columns_descriptor(uint32_t panel, int step, int panel_stride) {
  return descriptor(panel + static_cast<uint32_t>(step * 2 * kEightRows), panel_stride, kEightRows);
}

} // namespace offtower::cuda
