// Gradients on Hopper, once for either side. The sums of one tile and the scores of the next are in the
// tensor cores together, behind the other warpgroup's exponentials; ds goes from the scores' registers
// into the next product without touching shared memory.
#pragma once

#include "gradient_rows.h"
#include "hopper.h"

namespace offtower::cuda {

template <bool kItemsStay, Reward kReward, int kWidth>
struct HopperGradient {
  using Params = HopperProblem<GradientProblem>;
  // Fewer columns where registers would not last for 128: scores, rewards, ds and the sums are in them.
  // ptxas makes products wait for one another where they do not.
  static constexpr int kTiles =
      kReward == Reward::none ? (kWidth <= 128 ? 16 : 8) : (kWidth <= 128 ? 8 : 4);
  static constexpr int kColumns = kTiles * 8, kWidthTiles = kWidth / 8;
  using Rows = GradientRows<Bfloat16, kItemsStay, kReward, kTiles, kWidthTiles>;
  static constexpr int kVectors = Rows::kVectors;
  static constexpr int kMostThreads = kHopperThreads, kBlocks = 1;
  static constexpr int kFlush = (1 << 15) / kColumns; // tiles whose sums stay in registers

  static OFFTOWER_DEVICE void run(const Params& p, char* shared) {
    Pipeline<GradientProblem, kColumns, kVectors> pipeline(p, shared);
    pipeline.start();
    const int warp = same_in_warp(warp_index());
    if (warp < 4) {
      give_registers<kProducerRegisters>();
      if (warp == 0) produce(p, pipeline);
    } else {
      take_registers<kConsumerRegisters>();
      consume(p, pipeline);
    }
  }

private:
  template <class P>
  static OFFTOWER_DEVICE void produce(const Params& p, P& pipeline) {
    constexpr int kBytes = kItemsStay ? kRowStats * kColumns * 4 : 0;
    pipeline.produce(kBytes, [&](int64_t first, float* vectors, uint64_t* barrier) {
      if constexpr (kItemsStay) {
        // Tiles end within the padding of the contexts.
        if (lane_index() < kRowStats)
          copy_bytes(vectors + lane_index() * kColumns,
                     p.rows.stats + lane_index() * p.rows.padded_contexts + first, kColumns * 4, barrier);
      } else {
        item_biases_by_warp<kColumns>(p.rows.policy, first, vectors);
      }
    });
  }

  template <class P>
  static OFFTOWER_DEVICE void consume(const Params& p, P& pipeline) {
    const int warp = same_in_warp(warp_index());
    const int group_row = (warp / 4 - 1) * 64, warp_row = group_row + warp % 4 * 16;
    for (int64_t number = block_index(); number < p.works; number += block_count()) {
      const Work work = pipeline.work(number);
      Rows rows(p.rows, work.first_row + warp_row, work.split);
      float y[kTiles][4], q[Rows::kRewardTiles][4];
      uint32_t weights[kTiles / 2][4];
      pipeline.wait_stay();
      pipeline.wait_stage(); // a piece of work has at least one tile
      pin(rows.sum);
      before_products();
      pipeline.start_scores(group_row, y, q);
      commit_products();
      int before = -1, count = 0; // stage of the last tile, whose sums are under way
      for (int64_t tile = work.begin;;) {
        wait_products();
        pin(y);
        if constexpr (Rows::kRewardTiles > 1) pin(q);
        pin(rows.sum);
        if (before >= 0) pipeline.release_stage(before);
        before = pipeline.stream.at;
        const char* const stage = pipeline.stage();
        const float* const vectors = pipeline.vectors(before);
        rows.cotangents(tile * kColumns, vectors, y, q);
        if (kItemsStay && p.rows.own)
          rows.add_own(vectors, [&](int column, int k) {
            const char* panel = stage + k / kPanelWidth * kColumns * kPanelBytes;
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(
                panel + swizzled(column * kPanelBytes + k % kPanelWidth * 2));
            return Float2{{float_of_bits(pair << 16), float_of_bits(pair & 0xffff0000u)}};
          });
        if (p.rows.partial != nullptr && ++count % kFlush == 0) rows.flush();
        OFFTOWER_UNROLL
        for (int k = 0; k < kTiles / 2; ++k) {
          OFFTOWER_UNROLL
          for (int i = 0; i < 4; ++i)
            weights[k][i] = pack_bfloat16(y[2 * k + i / 2][i % 2 * 2], y[2 * k + i / 2][i % 2 * 2 + 1]);
        }
        pin(weights);
        pin(rows.sum);
        before_products();
        start_sums(shared_address(stage), weights, rows.sum);
        pipeline.stream.next();
        if (++tile == work.end) break;
        pipeline.wait_stage();
        pipeline.start_scores(group_row, y, q);
        commit_products();
      }
      commit_products();
      wait_products();
      pin(rows.sum);
      pipeline.release_stage(before);
      pipeline.release_stay();
      rows.write();
    }
  }

  // sum += ds Y: panels of Y hold 64 of its columns, and a product takes one or two.
  static OFFTOWER_DEVICE void start_sums(uint32_t stage, const uint32_t (&weights)[kTiles / 2][4],
                                         float (&sum)[kWidthTiles][4]) {
    constexpr int kProduct = kWidth == 64 ? 8 : 16; // fragments
    constexpr int kPanel = kColumns * kPanelBytes;
    OFFTOWER_UNROLL
    for (int k = 0; k < kTiles / 2; ++k) {
      OFFTOWER_UNROLL
      for (int n = 0; n < kWidthTiles; n += kProduct)
        group_weigh(reinterpret_cast<float(&)[kProduct][4]>(sum[n]), weights[k],
                    columns_descriptor(stage + static_cast<uint32_t>(n / 8 * kPanel), k, kPanel));
    }
  }
};

} // namespace offtower::cuda
