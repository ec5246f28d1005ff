// Forward pass on Hopper: contexts resident, items streamed. A warpgroup's score GEMM of the next tile is in
// flight during its exponentials of this one, and beside the other warpgroup's.
#pragma once

#include "../epilogue/online_softmax.h"
#include "../mainloop/tma_pipeline.h"

namespace offtower::cuda {

template <Reward kReward, bool kEntropy>
struct HopperForward {
  using Params = HopperParams<ForwardParams>;
  // Scores of two tiles must fit 232 registers, with rewards as many again: 64 columns then, which
  // also leaves shared memory for four stages at width 128.
  static constexpr int kMmaN = kReward == Reward::none ? 16 : 8;
  static constexpr int kBlockN = kMmaN * 8, kColumnVectors = 2;
  static constexpr int kMaxThreadsPerBlock = kHopperThreads, kMinBlocksPerMultiprocessor = 1;

  static OFFTOWER_DEVICE void run(const Params& p, char* shared) {
    TmaPipeline<ForwardParams, kBlockN, kColumnVectors> pipeline(p, shared);
    pipeline.init_barriers();
    const int warp = canonical_warp_idx_sync();
    if (warp < 4) {
      warpgroup_reg_dealloc<kProducerRegisters>();
      if (warp == 0) {
        ItemBiasPrefetch<kBlockN> biases(p.params.policy);
        pipeline.produce(
            0, [&](int64_t first, float* vectors, uint64_t*) { biases.store(first, vectors); });
      }
    } else {
      warpgroup_reg_alloc<kConsumerRegisters>();
      consume(p, pipeline);
    }
  }

private:
  using Epilogue = OnlineSoftmax<Bfloat16, 1, kMmaN, kReward, kEntropy>;
  struct Scores {
    float y[1][kMmaN][4], q[1][Epilogue::kRewardMmaN][4];
  };

  static OFFTOWER_DEVICE void drain(Scores& scores) {
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores.y[0]);
    if constexpr (Epilogue::kRewardMmaN > 1) warpgroup_fence_operand(scores.q[0]);
  }

  template <class Pipeline>
  static OFFTOWER_DEVICE void consume(const Params& p, Pipeline& pipeline) {
    const int warp = canonical_warp_idx_sync();
    const int group_row = (warp / 4 - 1) * 64, warp_row = group_row + warp % 4 * 16;
    for (int64_t number = block_idx(); number < p.work_tiles; number += grid_dim()) {
      const WorkTile work = pipeline.work(number);
      Epilogue softmax(p.params, work.first_row + warp_row);
      int64_t tile = work.begin;
      const auto issue = [&](Scores& scores) {
        warpgroup_arrive();
        pipeline.issue_score_gemm(group_row, scores.y[0], scores.q[0]);
        warpgroup_commit_batch();
      };
      // Adds the tile of `ready` while the GEMM of the next tile fills `next`; returns whether there is one.
      // The last tile's GEMM is issued twice: around a conditional wgmma, ptxas would serialize all (C7515).
      const auto add_tile = [&](Scores& ready, Scores& next) {
        drain(ready);
        const int stage = pipeline.streamed.index;
        const int64_t first = tile * kBlockN;
        const bool more = ++tile < work.end;
        if (more) {
          pipeline.streamed.advance();
          pipeline.wait_stage();
        }
        issue(next);
        softmax.add(first, pipeline.vectors(stage), ready.y, ready.q);
        syncwarp(); // add() diverges, and wgmma is .aligned
        if (more) pipeline.release_stage(stage);
        return more;
      };
      Scores even, odd;
      pipeline.wait_resident();
      pipeline.wait_stage(); // a work tile has at least one streamed tile
      syncwarp();            // write() diverges
      issue(even);
      for (;;) {
        if (!add_tile(even, odd)) {
          drain(odd);
          break;
        }
        if (!add_tile(odd, even)) {
          drain(even);
          break;
        }
      }
      pipeline.release_stage(pipeline.streamed.index);
      pipeline.streamed.advance();
      pipeline.release_resident();
      softmax.write(work.split);
    }
  }
};

} // namespace offtower::cuda
