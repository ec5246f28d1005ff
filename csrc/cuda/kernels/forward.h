// Forward, portable: contexts stay, items stream. Blocks are (split of items) x (group of contexts).
#pragma once

#include "forward_rows.h"
#include "stream.h"

namespace offtower::cuda {

template <class T, Reward kReward, bool kEntropy>
struct Forward {
  using Params = ForwardProblem;
  static constexpr int kColumns = Tiling<T>::kColumns, kTiles = kColumns / 8;
  // 32 rows a warp, so that each loaded item serves two products, while registers last.
  static constexpr int kFragments = kReward == Reward::dense ? 1 : 2;
  static constexpr int kRows = kFragments * kWarpRows, kMostThreads = 256 / kFragments;
  static constexpr int kBlocks = kFragments == 2 ? 2 : 1;
  static constexpr int kVectors = 2, kScratch = 0;

  static OFFTOWER_DEVICE void run(const Params& p, char* shared) {
    const Problem& o = p.policy;
    const int warps = thread_count() / 32, rows = warps * kRows, mine = warp_index() * kRows;
    const SharedLayout l = shared_layout(sizeof(T), kColumns, rows, o.stay.width,
                                         o.reward_stay.width, kVectors, o.stages, kScratch, warps);
    const Share share = share_of_block<T>(o, rows);
    using Rows = ForwardRows<T, kTiles, kFragments, kReward, kEntropy>;
    Rows sums(p, share.first_row + mine);
    for_each_tile<T>(
        o, l, share, rows, shared,
        [&](int64_t first, float* vectors) { load_item_biases<T>(o, first, vectors, kLog2E); },
        [&](int64_t first, const char* stage) {
          float y[kFragments][kTiles][4], q[kFragments][Rows::kRewardTiles][4];
          scores<kFragments, kTiles>(T{}, shared + l.stay + mine * l.stay_pitch, stage,
                                     l.stay_pitch, (l.stay_pitch - 16) / kStep, y);
          if constexpr (kReward == Reward::factored)
            scores<kFragments, kTiles>(T{}, shared + l.reward_stay + mine * l.reward_pitch,
                                       stage + l.reward_stream, l.reward_pitch,
                                       (l.reward_pitch - 16) / kStep, q);
          sums.add(first, reinterpret_cast<const float*>(stage + l.vectors), y, q);
        });
    sums.write(share.split);
  }
};

} // namespace offtower::cuda
