// How a pass is cut into blocks: from sizes and the device alone, so that the same call gives the same
// bits. Plain C++; nothing here needs a GPU.
#pragma once

#include "kernels/problem.h"
#include "operators.h"

namespace offtower::cuda {

// What a kernel needs of a block, from its template.
struct Footprint {
  int element, columns, warp_rows, most_warps, most_blocks, vectors, scratch;
};
template <class Kernel, class T>
constexpr Footprint footprint() {
  return {static_cast<int>(sizeof(T)), Kernel::kColumns, Kernel::kRows, Kernel::kMostThreads / 32,
          Kernel::kBlocks, Kernel::kVectors, Kernel::kScratch};
}

struct Plan {
  bool fits;
  int warps, stages, splits, shared_bytes;
  int64_t blocks;
};

// `split_bytes`: of partial sums a split, which together stay below kMostPartialBytes; 0: no limit.
constexpr int64_t kMostPartialBytes = int64_t{256} << 20;
constexpr int64_t kLeastTiles = 8; // of a split: less would be lost in its prologue
constexpr int64_t kMostSplits = 512;

// The least number of splits that leaves less than a twentieth of the device idle, or else the best.
inline int splits_for(int64_t groups, int64_t tiles, int64_t resident, int64_t split_bytes) {
  int64_t most = least(kMostSplits, largest(1, tiles / kLeastTiles));
  if (split_bytes > 0) most = least(most, largest(1, kMostPartialBytes / split_bytes));
  int64_t splits = 1;
  double best = 0.0;
  for (int64_t s = 1; s <= most; ++s) {
    const auto works = static_cast<double>(groups * s);
    const double busy = works / static_cast<double>(ceil_div(groups * s, resident) * resident);
    if (busy > best + 1e-9) {
      best = busy;
      splits = s;
    }
    if (busy >= 0.95) break;
  }
  return static_cast<int>(splits);
}

// The largest block whose tiles fit, two in flight rather than one; then as many splits of the stream
// as fill the device, where the rows that stay do not.
//
// `width`, `reward_width`: in shared memory, padded.
inline Plan plan_pass(const Device& device, const Footprint& f, int width, int reward_width,
                      int64_t stay_rows, int64_t stream_rows, int64_t split_bytes) {
  int most = f.most_warps;
  while (most > 1 && (most / 2) * f.warp_rows >= stay_rows) most /= 2;
  // (share of the most warps, stages), best first.
  constexpr int kChoices[][2] = {{1, 2}, {2, 2}, {1, 1}, {4, 2}, {2, 1}, {4, 1}, {8, 2}, {8, 1}};
  Plan plan{};
  for (const auto& choice : kChoices) {
    const int warps = most / choice[0];
    if (warps < 1) continue;
    const SharedLayout l = shared_layout(f.element, f.columns, warps * f.warp_rows, width,
                                         reward_width, f.vectors, choice[1], f.scratch, warps);
    if (l.bytes > device.block_shared) continue;
    plan = {true, warps, choice[1], 1, l.bytes, 0};
    break;
  }
  if (!plan.fits) return plan;
  // A multiprocessor keeps 1 KiB of shared memory a block for itself.
  const int64_t together =
      largest(1, least(f.most_blocks, device.total_shared / (plan.shared_bytes + 1024)));
  const int64_t groups = ceil_div(stay_rows, plan.warps * f.warp_rows);
  plan.splits = splits_for(groups, ceil_div(stream_rows, f.columns),
                           device.multiprocessors * together, split_bytes);
  plan.blocks = groups * plan.splits;
  return plan;
}

// Hopper's kernels: two warpgroups with 64 rows each, one block a multiprocessor that takes one piece
// of work after the other. Tiles are panels of 64 numbers a row.
struct HopperLayout {
  int stay_bytes, stage_bytes;     // of one stage each
  int reward_stay, reward_stream;  // within them
  int vectors;                     // within a stage of the stream
  int stages, barriers, bytes;     // in shared memory; the stay side's stages come first
};
constexpr int kHopperRows = 128;

OFFTOWER_BOTH constexpr HopperLayout hopper_layout(int columns, int panels, int reward_panels,
                                                   int vectors, int stay_stages, int stages) {
  HopperLayout l{};
  l.reward_stay = panels * kHopperRows * 128;
  l.stay_bytes = l.reward_stay + reward_panels * kHopperRows * 128;
  l.reward_stream = panels * columns * 128;
  l.vectors = l.reward_stream + reward_panels * columns * 128;
  l.stage_bytes = static_cast<int>(ceil_div(l.vectors + vectors * columns * 4, 1024) * 1024);
  l.stages = stay_stages * l.stay_bytes;
  l.barriers = l.stages + stages * l.stage_bytes;
  l.bytes = l.barriers + 2 * (stay_stages + stages) * 8;
  return l;
}

struct HopperPlan {
  bool fits;
  int stay_stages, stages, splits, shared_bytes;
  int64_t works, blocks;
};

inline HopperPlan plan_hopper(const Device& device, int columns, int panels, int reward_panels,
                              int vectors, int64_t stay_rows, int64_t stream_rows,
                              int64_t split_bytes) {
  if (device.major != 9) return {};
  const int64_t groups = ceil_div(stay_rows, kHopperRows), tiles = ceil_div(stream_rows, columns);
  const int splits = splits_for(groups, tiles, device.multiprocessors, split_bytes);
  // (stages of the stay side, of the stream), best first. Where the stream is short the next rows must
  // be on their way early; where it is long, its own tiles.
  constexpr int kShort[][2] = {{2, 4}, {2, 3}, {2, 2}, {1, 4}, {1, 3}, {1, 2}};
  constexpr int kLong[][2] = {{2, 4}, {2, 3}, {1, 4}, {1, 3}, {2, 2}, {1, 2}};
  constexpr int64_t kShortTiles = 64;
  HopperPlan plan{};
  for (const auto& choice : tiles / splits < kShortTiles ? kShort : kLong) {
    const HopperLayout l = hopper_layout(columns, panels, reward_panels, vectors, choice[0], choice[1]);
    if (l.bytes > device.block_shared) continue;
    plan = {true, choice[0], choice[1], splits, l.bytes, 0, 0};
    break;
  }
  if (!plan.fits) return plan;
  plan.works = groups * plan.splits;
  plan.blocks = least(plan.works, device.multiprocessors);
  return plan;
}

// Arrays in a workspace, one after the other; with a null base only their size is counted.
class Workspace {
public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
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
