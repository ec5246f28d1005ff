// Byte offsets in a block's shared memory.
#pragma once

#include "../kernels/params.h"

namespace offtower::cuda {

// What a portable kernel needs of shared memory beside the widths of its matrices.
struct TileShape {
  int element_bytes, block_n, warp_m;
  int vectors;      // 32-bit words for each column
  int warp_scratch; // bytes for each warp
};
template <class Kernel, class T>
OFFTOWER_BOTH constexpr TileShape tile_shape() {
  return {static_cast<int>(sizeof(T)), Kernel::kBlockN, Kernel::kWarpM, Kernel::kColumnVectors,
          Kernel::kWarpScratchBytes};
}

// Bytes from one row to the next: an odd multiple of 16, so that ldmatrix finds the 16-byte chunks of
// eight rows in different banks.
OFFTOWER_BOTH constexpr int pitch(int width, int element_bytes) {
  return static_cast<int>(ceil_div(static_cast<int64_t>(width) * element_bytes, kStepBytes)) *
             kStepBytes +
         16;
}
static_assert(kStepBytes % 32 == 0, "a pitch is an odd multiple of 16 bytes");

// The resident tiles, then stages of a streamed tile, its reward tile and its vectors.
struct SharedLayout {
  int resident_pitch, reward_pitch; // those of streamed tiles too
  int resident, reward_resident, stages, stage_bytes;
  int reward_streamed, vectors; // within a stage
  int scratch, bytes;
};

OFFTOWER_BOTH constexpr SharedLayout shared_layout(TileShape shape, int warps, int width,
                                                   int reward_width, int stages) {
  SharedLayout l{};
  const int rows = warps * shape.warp_m;
  l.resident_pitch = pitch(width, shape.element_bytes);
  l.reward_pitch = reward_width == 0 ? 0 : pitch(reward_width, shape.element_bytes);
  l.resident = 0;
  l.reward_resident = rows * l.resident_pitch;
  l.stages = l.reward_resident + rows * l.reward_pitch;
  l.reward_streamed = shape.block_n * l.resident_pitch;
  l.vectors = l.reward_streamed + shape.block_n * l.reward_pitch;
  l.stage_bytes = l.vectors + shape.vectors * shape.block_n * 4;
  l.scratch = l.stages + stages * l.stage_bytes;
  l.bytes = l.scratch + warps * shape.warp_scratch;
  return l;
}

// Hopper: tiles are panels of 64 columns (128 bytes a row, see ptx/sm90.h), and the resident tile has
// stages of its own.
constexpr int kHopperBlockM = 128; // two consumer warpgroups of 64 rows

struct HopperTileShape {
  int block_n, panels, reward_panels, vectors;
};

struct HopperLayout {
  int resident_bytes, stage_bytes;      // of one stage each
  int reward_resident, reward_streamed; // within a stage
  int vectors;                          // within a streamed stage
  int stages, barriers, bytes;          // resident stages come first
};

OFFTOWER_BOTH constexpr HopperLayout hopper_layout(HopperTileShape shape, int resident_stages,
                                                   int stages) {
  HopperLayout l{};
  l.reward_resident = shape.panels * kHopperBlockM * 128;
  l.resident_bytes = l.reward_resident + shape.reward_panels * kHopperBlockM * 128;
  l.reward_streamed = shape.panels * shape.block_n * 128;
  l.vectors = l.reward_streamed + shape.reward_panels * shape.block_n * 128;
  l.stage_bytes =
      static_cast<int>(ceil_div(l.vectors + shape.vectors * shape.block_n * 4, 1024) * 1024);
  l.stages = resident_stages * l.resident_bytes;
  l.barriers = l.stages + stages * l.stage_bytes;
  l.bytes = l.barriers + 2 * (resident_stages + stages) * 8;
  return l;
}
static_assert(kHopperBlockM * 128 % 1024 == 0, "stages start on a swizzle atom");

} // namespace offtower::cuda
