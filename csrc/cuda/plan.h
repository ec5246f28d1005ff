// How a pass is divided into blocks, from sizes and the device alone, so that equal calls give equal bits.
#pragma once

#include "mainloop/shared_layout.h"
#include "operators.h"

namespace offtower::cuda {

struct PassShape {
  int width, reward_width; // of the tiles, padded
  int64_t resident_rows, streamed_rows;
  int64_t split_bytes; // of partial sums for each split
};

// What a portable kernel needs of a multiprocessor.
struct Footprint {
  TileShape tile;
  int max_warps, max_blocks;
};
template <class Kernel, class T>
constexpr Footprint footprint() {
  return {tile_shape<Kernel, T>(), Kernel::kMaxThreadsPerBlock / 32,
          Kernel::kMinBlocksPerMultiprocessor};
}

struct Plan {
  bool fits;
  int warps, stages, splits, shared_bytes;
  int64_t blocks;
};

constexpr int64_t kMaxPartialBytes = int64_t{256} << 20; // of all splits together
constexpr int64_t kMinTilesPerSplit = 8;                 // amortizes a block's prologue
constexpr int64_t kMaxSplits = 512;

// The fewest splits that keep at least 95 % of the slots for blocks busy, or else the busiest number.
inline int num_splits_heuristic(int64_t groups, int64_t tiles, int64_t slots, int64_t split_bytes) {
  int64_t max_splits = min(kMaxSplits, max(1, tiles / kMinTilesPerSplit));
  if (split_bytes > 0) max_splits = min(max_splits, max(1, kMaxPartialBytes / split_bytes));
  int64_t splits = 1;
  double best = 0.0;
  for (int64_t s = 1; s <= max_splits; ++s) {
    const auto blocks = static_cast<double>(groups * s);
    const double busy = blocks / static_cast<double>(ceil_div(groups * s, slots) * slots);
    if (busy > best + 1e-9) {
      best = busy;
      splits = s;
    }
    if (busy >= 0.95) break;
  }
  return static_cast<int>(splits);
}

// The largest block whose tiles fit, with two stages rather than one; then splits of the streamed rows
// where the resident rows do not fill the device.
inline Plan plan_pass(const Device& device, const Footprint& f, const PassShape& pass) {
  int max_warps = f.max_warps;
  while (max_warps > 1 && (max_warps / 2) * f.tile.warp_m >= pass.resident_rows) max_warps /= 2;
  // (divisor of max_warps, stages), in order of preference.
  constexpr int kChoices[][2] = {{1, 2}, {2, 2}, {1, 1}, {4, 2}, {2, 1}, {4, 1}, {8, 2}, {8, 1}};
  Plan plan{};
  for (const auto& choice : kChoices) {
    const int warps = max_warps / choice[0];
    if (warps < 1) continue;
    const SharedLayout l = shared_layout(f.tile, warps, pass.width, pass.reward_width, choice[1]);
    if (l.bytes > device.block_shared) continue;
    plan = {true, warps, choice[1], 1, l.bytes, 0};
    break;
  }
  if (!plan.fits) return plan;
  constexpr int kReservedBytes = 1024; // of shared memory, by CUDA for each block
  const int64_t concurrent = device.total_shared / (plan.shared_bytes + kReservedBytes);
  const int64_t slots = device.multiprocessors * max(1, min(f.max_blocks, concurrent));
  const int64_t groups = ceil_div(pass.resident_rows, plan.warps * f.tile.warp_m);
  plan.splits = num_splits_heuristic(groups, ceil_div(pass.streamed_rows, f.tile.block_n), slots,
                                     pass.split_bytes);
  plan.blocks = groups * plan.splits;
  return plan;
}

// One persistent block for each multiprocessor.
struct HopperPlan {
  bool fits;
  int resident_stages, stages, splits, shared_bytes;
  int64_t work_tiles, blocks;
};

inline HopperPlan plan_hopper(const Device& device, const HopperTileShape& tile,
                              const PassShape& pass) {
  if (!device.hopper_kernels) return {};
  const int64_t groups = ceil_div(pass.resident_rows, kHopperBlockM);
  const int64_t tiles = ceil_div(pass.streamed_rows, tile.block_n);
  const int splits = num_splits_heuristic(groups, tiles, device.multiprocessors, pass.split_bytes);
  // (resident stages, streamed stages), in order of preference. With few tiles for each work tile, the
  // next resident tile must be loaded early; with many, the streamed ones.
  constexpr int kShort[][2] = {{2, 4}, {2, 3}, {2, 2}, {1, 4}, {1, 3}, {1, 2}};
  constexpr int kLong[][2] = {{2, 4}, {2, 3}, {1, 4}, {1, 3}, {2, 2}, {1, 2}};
  constexpr int64_t kShortTiles = 64;
  HopperPlan plan{};
  for (const auto& choice : tiles / splits < kShortTiles ? kShort : kLong) {
    const HopperLayout l = hopper_layout(tile, choice[0], choice[1]);
    if (l.bytes > device.block_shared) continue;
    plan = {true, choice[0], choice[1], splits, l.bytes, 0, 0};
    break;
  }
  if (!plan.fits) return plan;
  plan.work_tiles = groups * plan.splits;
  plan.blocks = min(plan.work_tiles, device.multiprocessors);
  return plan;
}

// Consecutive arrays in a workspace; with a null base only their size is counted.
class Workspace {
public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* allocate(int64_t count) {
    char* at = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return reinterpret_cast<T*>(at);
  }
  int64_t bytes() const { return bytes_; }

private:
  char* base_;
  int64_t bytes_ = 0;
};

} // namespace offtower::cuda
