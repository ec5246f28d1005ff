// Forward pass on Hopper: contexts resident, items streamed. The exponentials of one warpgroup overlap the
// score GEMM of the other.
#pragma once

#include "../epilogue/online_softmax.h"
#include "../mainloop/tma_pipeline.h"

namespace offtower::cuda {

template <Reward kReward, bool kEntropy>
struct HopperForward {
  using Params = HopperParams<ForwardParams>;
  static constexpr int kMmaN = 16, kBlockN = kMmaN * 8, kColumnVectors = 2;
  static constexpr int kMaxThreadsPerBlock = kHopperThreads, kMinBlocksPerMultiprocessor = 1;

  static OFFTOWER_DEVICE void run(const Params& p, char* shared) {
    TmaPipeline<ForwardParams, kBlockN, kColumnVectors> pipeline(p, shared);
    pipeline.init_barriers();
    const int warp = canonical_warp_idx_sync();
    if (warp < 4) {
      warpgroup_reg_dealloc<kProducerRegisters>();
      if (warp == 0)
        pipeline.produce(0, [&](int64_t first, float* vectors, uint64_t*) {
          warp_load_item_biases<kBlockN>(p.params.policy, first, vectors);
        });
    } else {
      warpgroup_reg_alloc<kConsumerRegisters>();
      consume(p, pipeline);
    }
  }

private:
  template <class Pipeline>
  static OFFTOWER_DEVICE void consume(const Params& p, Pipeline& pipeline) {
    using Epilogue = OnlineSoftmax<Bfloat16, 1, kMmaN, kReward, kEntropy>;
    const int warp = canonical_warp_idx_sync();
    const int group_row = (warp / 4 - 1) * 64, warp_row = group_row + warp % 4 * 16;
    for (int64_t number = block_idx(); number < p.work_tiles; number += grid_dim()) {
      const WorkTile work = pipeline.work(number);
      Epilogue softmax(p.params, work.first_row + warp_row);
      pipeline.wait_resident();
      syncwarp(); // write() diverges, and wgmma is .aligned
      for (int64_t tile = work.begin; tile < work.end; ++tile) {
        float y[1][kMmaN][4], q[1][Epilogue::kRewardMmaN][4];
        pipeline.wait_stage();
        warpgroup_arrive();
        pipeline.issue_score_gemm(group_row, y[0], q[0]);
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(y[0]);
        if constexpr (Epilogue::kRewardMmaN > 1) warpgroup_fence_operand(q[0]);
        softmax.add(tile * kBlockN, pipeline.vectors(pipeline.streamed.index), y, q);
        pipeline.release_stage(pipeline.streamed.index);
        pipeline.streamed.advance();
      }
      pipeline.release_resident();
      softmax.write(work.split);
    }
  }
};

} // namespace offtower::cuda
