// Forward pass, portable: contexts resident, items streamed; a block for each work tile.
#pragma once

#include "../epilogue/online_softmax.h"
#include "../mainloop/cp_async_mainloop.h"

namespace offtower::cuda {

template <class T, Reward kReward, bool kEntropy, bool kMasked>
struct Forward {
  using Params = ForwardParams;
  static constexpr int kBlockN = kBlockNOf<T>, kMmaN = kBlockN / 8;
  // With 32 rows a warp each B fragment serves two mmas. Dense rewards leave registers for 16.
  static constexpr int kMmaM = kReward == Reward::dense ? 1 : 2;
  static constexpr int kWarpM = kMmaM * kAtomM, kMaxThreadsPerBlock = 256 / kMmaM;
  static constexpr int kMinBlocksPerMultiprocessor = kMmaM == 2 ? 2 : 1;
  static constexpr int kColumnVectors = 2, kWarpScratchBytes = 0;

  static OFFTOWER_DEVICE void run(const Params& p, char* shared) {
    const PolicyParams& o = p.policy;
    const int warps = block_dim() / 32, block_m = warps * kWarpM, warp_row = warp_idx() * kWarpM;
    const SharedLayout l = shared_layout(tile_shape<Forward, T>(), warps, o.resident.width,
                                         o.reward_resident.width, o.stages);
    const WorkTile work = work_tile(o, block_idx(), block_m, kBlockN);
    using Epilogue = OnlineSoftmax<T, kMmaM, kMmaN, kReward, kEntropy>;
    Epilogue softmax(p, work.first_row + warp_row);
    cp_async_mainloop<T>(
        o, l, work, block_m, shared,
        [&](int64_t first, float* vectors) { load_item_biases<T>(o, first, vectors, kLog2E); },
        [&](int64_t first, const char* stage) {
          float y[kMmaM][kMmaN][4], q[kMmaM][Epilogue::kRewardMmaN][4];
          score_gemm(T{}, shared + l.resident + warp_row * l.resident_pitch, stage,
                     l.resident_pitch, (l.resident_pitch - 16) / kStepBytes, y);
          if constexpr (kMasked)
            mask_items(p.eligible, work.first_row + warp_row, o.resident.rows, first, y);
          if constexpr (kReward == Reward::factored)
            score_gemm(T{}, shared + l.reward_resident + warp_row * l.reward_pitch,
                       stage + l.reward_streamed, l.reward_pitch,
                       (l.reward_pitch - 16) / kStepBytes, q);
          softmax.add(first, reinterpret_cast<const float*>(stage + l.vectors), y, q);
        });
    softmax.write(work.split);
  }
};

} // namespace offtower::cuda
