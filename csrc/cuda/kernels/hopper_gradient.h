// Gradients on Hopper: du with contexts resident, dv with items resident. The weighted-sum GEMM of one tile
// and the score GEMM of the next are in flight together, behind the other warpgroup's exponentials. ds goes
// from the score accumulators to operand A of the second GEMM in registers.
#pragma once

#include "../epilogue/score_gradient.h"
#include "../mainloop/tma_pipeline.h"

namespace offtower::cuda {

template <bool kItemsResident, Reward kReward, int kDim>
struct HopperGradient {
  using Params = HopperParams<GradientParams>;
  // Fragments of scores, rewards, ds and sums must fit 232 registers; where they do not, ptxas serializes
  // the wgmmas (C7512). 128 columns leave no room for rewards, or for sums of width 256.
  static constexpr int kMmaN =
      kReward == Reward::none ? (kDim <= 128 ? 16 : 8) : (kDim <= 128 ? 8 : 4);
  static constexpr int kBlockN = kMmaN * 8, kMmaD = kDim / 8;
  using Epilogue = ScoreGradient<Bfloat16, kItemsResident, kReward, kMmaN, kMmaD>;
  static constexpr int kColumnVectors = Epilogue::kColumnVectors;
  static constexpr int kMaxThreadsPerBlock = kHopperThreads, kMinBlocksPerMultiprocessor = 1;
  static constexpr int kFlushInterval = (1 << 15) / kBlockN; // tiles
  static_assert(kDim % kPanelWidth == 0, "sums are whole panels wide");
  static_assert(kMmaN % 2 == 0, "two score fragments make operand A of one wgmma");

  static OFFTOWER_DEVICE void run(const Params& p, char* shared) {
    TmaPipeline<GradientParams, kBlockN, kColumnVectors> pipeline(p, shared);
    pipeline.init_barriers();
    const int warp = canonical_warp_idx_sync();
    if (warp < 4) {
      warpgroup_reg_dealloc<kProducerRegisters>();
      if (warp == 0) produce(p.params, pipeline);
    } else {
      warpgroup_reg_alloc<kConsumerRegisters>();
      consume(p, pipeline);
    }
  }

private:
  template <class Pipeline>
  static OFFTOWER_DEVICE void produce(const GradientParams& p, Pipeline& pipeline) {
    constexpr int kBytes = kItemsResident ? kRowStats * kBlockN * 4 : 0;
    [[maybe_unused]] ItemBiasPrefetch<kBlockN> biases(p.policy);
    pipeline.produce(kBytes, [&](int64_t first, float* vectors, uint64_t* barrier) {
      if constexpr (kItemsResident) {
        if (lane_idx() < kRowStats)
          bulk_copy_g2s(vectors + lane_idx() * kBlockN,
                        p.stats + lane_idx() * p.padded_contexts + first, kBlockN * 4, barrier);
      } else {
        biases.store(first, vectors);
      }
    });
  }

  template <class Pipeline>
  static OFFTOWER_DEVICE void consume(const Params& p, Pipeline& pipeline) {
    const int warp = canonical_warp_idx_sync();
    const int group_row = (warp / 4 - 1) * 64, warp_row = group_row + warp % 4 * 16;
    for (int64_t number = block_idx(); number < p.work_tiles; number += grid_dim()) {
      const WorkTile work = pipeline.work(number);
      Epilogue epilogue(p.params, work.first_row + warp_row, work.split);
      float y[kMmaN][4], q[Epilogue::kRewardMmaN][4];
      uint32_t weights[kMmaN / 2][4]; // ds in bfloat16, as operand A
      pipeline.wait_resident();
      pipeline.wait_stage(); // a work tile has at least one streamed tile
      syncwarp();            // write() diverges, and wgmma is .aligned
      warpgroup_fence_operand(epilogue.sum);
      warpgroup_arrive();
      pipeline.issue_score_gemm(group_row, y, q);
      warpgroup_commit_batch();
      int previous = -1, count = 0; // stage of the tile whose weighted sums are in flight
      for (int64_t tile = work.begin;;) {
        warpgroup_wait<0>();
        warpgroup_fence_operand(y);
        if constexpr (Epilogue::kRewardMmaN > 1) warpgroup_fence_operand(q);
        warpgroup_fence_operand(epilogue.sum);
        if (previous >= 0) pipeline.release_stage(previous);
        if (tile + 1 == work.end) pipeline.release_resident(); // after its last scores
        previous = pipeline.streamed.index;
        const char* const stage = pipeline.stage();
        const float* const vectors = pipeline.vectors(previous);
        epilogue.to_score_gradients(tile * kBlockN, vectors, y, q);
        if (kItemsResident && p.params.has_log_prob)
          epilogue.add_target(vectors, [&](int column, int k) {
            const char* panel = stage + k / kPanelWidth * kBlockN * kPanelBytes;
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(
                panel + swizzle_128b(column * kPanelBytes + k % kPanelWidth * 2));
            return Float2{{uint_as_float(pair << 16), uint_as_float(pair & 0xffff0000u)}};
          });
        if (p.params.partial != nullptr && ++count % kFlushInterval == 0) epilogue.flush();
        OFFTOWER_UNROLL
        for (int k = 0; k < kMmaN / 2; ++k) {
          OFFTOWER_UNROLL
          for (int i = 0; i < 4; ++i)
            weights[k][i] =
                cvt_bf16x2(y[2 * k + i / 2][i % 2 * 2], y[2 * k + i / 2][i % 2 * 2 + 1]);
        }
        syncwarp(); // add_target and flush diverge
        warpgroup_fence_operand(weights);
        warpgroup_fence_operand(epilogue.sum);
        warpgroup_arrive();
        issue_weighted_sum_gemm(gmma_address(stage), weights, epilogue.sum);
        pipeline.streamed.advance();
        if (++tile == work.end) break;
        pipeline.wait_stage();
        pipeline.issue_score_gemm(group_row, y, q);
        warpgroup_commit_batch();
      }
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      warpgroup_fence_operand(epilogue.sum);
      pipeline.release_stage(previous);
      epilogue.write();
    }
  }

  // sum += ds Y. A wgmma is one panel wide, or two.
  static OFFTOWER_DEVICE void issue_weighted_sum_gemm(uint32_t stage,
                                                      const uint32_t (&weights)[kMmaN / 2][4],
                                                      float (&sum)[kMmaD][4]) {
    constexpr int kWgmmaN = kDim == 64 ? 8 : 16; // fragments
    constexpr int kPanel = kBlockN * kPanelBytes;
    OFFTOWER_UNROLL
    for (int k = 0; k < kMmaN / 2; ++k) {
      OFFTOWER_UNROLL
      for (int n = 0; n < kMmaD; n += kWgmmaN)
        wgmma_rs(reinterpret_cast<float (&)[kWgmmaN][4]>(sum[n]), weights[k],
                 mn_major_desc(stage + static_cast<uint32_t>(n / 8 * kPanel), k, kPanel));
    }
  }
};

} // namespace offtower::cuda
