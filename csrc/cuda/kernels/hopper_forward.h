// Forward on Hopper: contexts stay, items stream. While one warpgroup's scores are in the tensor
// cores, the other's exponentials are in the special function units.
#pragma once

#include "forward_rows.h"
#include "hopper.h"

namespace offtower::cuda {

template <Reward kReward, bool kEntropy>
struct HopperForward {
  using Params = HopperProblem<ForwardProblem>;
  static constexpr int kTiles = 16, kColumns = kTiles * 8, kVectors = 2;
  static constexpr int kMostThreads = kHopperThreads, kBlocks = 1;

  static OFFTOWER_DEVICE void run(const Params& p, char* shared) {
    Pipeline<ForwardProblem, kColumns, kVectors> pipeline(p, shared);
    pipeline.start();
    const int warp = same_in_warp(warp_index());
    if (warp < 4) {
      give_registers<kProducerRegisters>();
      if (warp == 0)
        pipeline.produce(0, [&](int64_t first, float* vectors, uint64_t*) {
          item_biases_by_warp<kColumns>(p.rows.policy, first, vectors);
        });
    } else {
      take_registers<kConsumerRegisters>();
      consume(p, pipeline);
    }
  }

private:
  template <class P>
  static OFFTOWER_DEVICE void consume(const Params& p, P& pipeline) {
    using Rows = ForwardRows<Bfloat16, kTiles, 1, kReward, kEntropy>;
    const int warp = same_in_warp(warp_index());
    const int group_row = (warp / 4 - 1) * 64, warp_row = group_row + warp % 4 * 16;
    for (int64_t number = block_index(); number < p.works; number += block_count()) {
      const Work work = pipeline.work(number);
      Rows rows(p.rows, work.first_row + warp_row);
      pipeline.wait_stay();
      for (int64_t tile = work.begin; tile < work.end; ++tile) {
        float y[1][kTiles][4], q[1][Rows::kRewardTiles][4];
        pipeline.wait_stage();
        before_products();
        pipeline.start_scores(group_row, y[0], q[0]);
        commit_products();
        wait_products();
        pin(y[0]);
        if constexpr (Rows::kRewardTiles > 1) pin(q[0]);
        rows.add(tile * kColumns, pipeline.vectors(pipeline.stream.at), y, q);
        pipeline.release_stage(pipeline.stream.at);
        pipeline.stream.next();
      }
      pipeline.release_stay();
      rows.write(work.split);
    }
  }
};

} // namespace offtower::cuda
