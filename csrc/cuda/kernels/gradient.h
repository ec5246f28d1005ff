// Gradients, portable, once for either side. du: contexts stay and items stream. dv: items stay and
// contexts stream. Blocks are (split of the stream) x (group of rows that stay).
#pragma once

#include <type_traits>

#include "gradient_rows.h"
#include "stream.h"

namespace offtower::cuda {

template <class T, bool kItemsStay, Reward kReward, int kWidth>
struct Gradient {
  using Params = GradientProblem;
  static constexpr int kColumns = Tiling<T>::kColumns, kTiles = kColumns / 8;
  using Rows = GradientRows<T, kItemsStay, kReward, kTiles, kWidth / 8>;
  static constexpr int kRows = Rows::kRows, kMostThreads = 256, kBlocks = 1;
  static constexpr int kVectors = Rows::kVectors;
  static constexpr bool kPlain = std::is_same<T, float>::value; // no tensor cores
  static constexpr int kScratch = kPlain ? kRows * kScratchPitch<kTiles> * 4 : 0;
  static constexpr int kFlush = kPlain ? 64 : (1 << 15) / kColumns; // tiles whose sums stay in registers

  static OFFTOWER_DEVICE void run(const Params& p, char* shared) {
    const Problem& o = p.policy;
    const int warps = thread_count() / 32, rows = warps * kRows, mine = warp_index() * kRows;
    const SharedLayout l = shared_layout(sizeof(T), kColumns, rows, kWidth, o.reward_stay.width,
                                         kVectors, o.stages, kScratch, warps);
    const int steps = static_cast<int>(ceil_div(o.stay.width * static_cast<int>(sizeof(T)), kStep));
    const Share share = share_of_block<T>(o, rows);
    char* const scratch = shared + l.scratch + warp_index() * kScratch;
    Rows work(p, share.first_row + mine, share.split);
    int count = 0;
    for_each_tile<T>(
        o, l, share, rows, shared,
        [&](int64_t first, float* vectors) {
          if constexpr (kItemsStay) load_row_stats(p, first, vectors);
          else load_item_biases<T>(o, first, vectors, kLog2E);
        },
        [&](int64_t first, const char* stage) {
          const float* vectors = reinterpret_cast<const float*>(stage + l.vectors);
          float y[1][kTiles][4], q[1][Rows::kRewardTiles][4];
          scores<1, kTiles>(T{}, shared + l.stay + mine * l.stay_pitch, stage, l.stay_pitch, steps, y);
          if constexpr (kReward == Reward::factored)
            scores<1, kTiles>(T{}, shared + l.reward_stay + mine * l.reward_pitch,
                              stage + l.reward_stream, l.reward_pitch, (l.reward_pitch - 16) / kStep,
                              q);
          work.cotangents(first, vectors, y[0], q[0]);
          weigh<kTiles, kWidth / 8>(T{}, y[0], stage, l.stay_pitch, scratch, work.sum);
          if (kItemsStay && p.own)
            work.add_own(vectors, [&](int column, int k) {
              const T* u = reinterpret_cast<const T*>(stage + column * l.stay_pitch) + k;
              return Float2{{to_float(u[0]), to_float(u[1])}};
            });
          if (++count % kFlush == 0 && p.partial != nullptr) work.flush();
        });
    work.write();
  }

private:
  // Tiles end within the padding of the contexts.
  static OFFTOWER_DEVICE void load_row_stats(const Params& p, int64_t first, float* vectors) {
    constexpr int kPieces = kColumns / 4;
    for (int i = thread_index(); i < kRowStats * kPieces; i += thread_count()) {
      const int which = i / kPieces, piece = i % kPieces;
      copy_async(vectors + which * kColumns + piece * 4,
                 p.stats + which * p.padded_contexts + first + piece * 4, true);
    }
  }
};

} // namespace offtower::cuda
