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

// The largest block whose tiles fit, two in flight rather than one; then as many splits of the stream
// as fill the device, where the rows that stay do not.
//
// `width`, `reward_width`: in shared memory, padded. `split_bytes`: of partial sums a split, which
// together stay below kMostPartialBytes; 0: no limit.
constexpr int64_t kMostPartialBytes = int64_t{256} << 20;
constexpr int64_t kLeastTiles = 8; // of a split: less would be lost in its prologue
constexpr int64_t kMostSplits = 512;

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
  const int64_t groups = ceil_div(stay_rows, plan.warps * f.warp_rows);
  const int64_t tiles = ceil_div(stream_rows, f.columns);
  // A multiprocessor keeps 1 KiB of shared memory a block for itself.
  const int64_t together = largest(1, least(f.most_blocks, device.total_shared / (plan.shared_bytes + 1024)));
  const int64_t resident = device.multiprocessors * together;
  int64_t most_splits = least(kMostSplits, largest(1, tiles / kLeastTiles));
  if (split_bytes > 0) most_splits = least(most_splits, largest(1, kMostPartialBytes / split_bytes));
  // The least number of splits that leaves less than a tenth of the device idle, or else the best.
  int64_t splits = 1;
  double best = 0.0;
  for (int64_t s = 1; s <= most_splits; ++s) {
    const double busy = static_cast<double>(groups * s) / static_cast<double>(ceil_div(groups * s, resident) * resident);
    if (busy > best + 1e-9) {
      best = busy;
      splits = s;
    }
    if (busy >= 0.9) break;
  }
  plan.splits = static_cast<int>(splits);
  plan.blocks = groups * splits;
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
