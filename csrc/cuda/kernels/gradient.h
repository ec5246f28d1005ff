// Gradients, portable; a block for each work tile. du: contexts resident, items streamed. dv: items
// resident, contexts streamed.
#pragma once

#include <type_traits>

#include "../epilogue/score_gradient.h"
#include "../mainloop/cp_async_mainloop.h"

namespace offtower::cuda {

template <class T, bool kItemsResident, Reward kReward, int kDim, bool kMasked>
struct Gradient {
  using Params = GradientParams;
  static constexpr int kBlockN = kBlockNOf<T>, kMmaN = kBlockN / 8;
  using Epilogue = ScoreGradient<T, kItemsResident, kReward, kMmaN, kDim / 8>;
  static constexpr int kWarpM = Epilogue::kWarpM, kColumnVectors = Epilogue::kColumnVectors;
  static constexpr int kMaxThreadsPerBlock = 256, kMinBlocksPerMultiprocessor = 1;
  static constexpr bool kSimt = std::is_same<T, float>::value; // no tensor cores
  static constexpr int kWarpScratchBytes = kSimt ? kWarpM * kScratchPitch<kMmaN> * 4 : 0;
  static constexpr int kFlushInterval = kSimt ? 64 : (1 << 15) / kBlockN; // tiles

  static OFFTOWER_DEVICE void run(const Params& p, char* shared) {
    const PolicyParams& o = p.policy;
    const int warps = block_dim() / 32, block_m = warps * kWarpM, warp_row = warp_idx() * kWarpM;
    const SharedLayout l =
        shared_layout(tile_shape<Gradient, T>(), warps, kDim, o.reward_resident.width, o.stages);
    const int steps =
        static_cast<int>(ceil_div(o.resident.width * static_cast<int>(sizeof(T)), kStepBytes));
    const WorkTile work = work_tile(o, block_idx(), block_m, kBlockN);
    char* const scratch = shared + l.scratch + warp_idx() * kWarpScratchBytes;
    Epilogue epilogue(p, work.first_row + warp_row, work.split);
    int count = 0;
    cp_async_mainloop<T>(
        o, l, work, block_m, shared,
        [&](int64_t first, float* vectors) {
          if constexpr (kItemsResident)
            load_row_stats(p, first, vectors);
          else
            load_item_biases<T>(o, first, vectors, kLog2E);
        },
        [&](int64_t first, const char* stage) {
          const float* vectors = reinterpret_cast<const float*>(stage + l.vectors);
          float y[1][kMmaN][4], q[1][Epilogue::kRewardMmaN][4];
          score_gemm(T{}, shared + l.resident + warp_row * l.resident_pitch, stage,
                     l.resident_pitch, steps, y);
          if constexpr (kMasked) mask(p, work.first_row + warp_row, first, y);
          if constexpr (kReward == Reward::factored)
            score_gemm(T{}, shared + l.reward_resident + warp_row * l.reward_pitch,
                       stage + l.reward_streamed, l.reward_pitch,
                       (l.reward_pitch - 16) / kStepBytes, q);
          epilogue.to_score_gradients(first, vectors, y[0], q[0]);
          weighted_sum_gemm(T{}, y[0], stage, l.resident_pitch, scratch, epilogue.sum);
          if (kItemsResident && p.has_log_prob)
            epilogue.add_target(vectors, [&](int column, int k) {
              const T* u = reinterpret_cast<const T*>(stage + column * l.resident_pitch) + k;
              return Float2{{to_float(u[0]), to_float(u[1])}};
            });
          if (++count % kFlushInterval == 0 && p.partial != nullptr) epilogue.flush();
        });
    epilogue.write();
  }

private:
  static OFFTOWER_DEVICE void mask(const Params& p, int64_t row, int64_t first,
                                   float (&y)[1][kMmaN][4]) {
    const PolicyParams& o = p.policy;
    if constexpr (kItemsResident)
      mask_contexts(p.eligible, row, o.items, first, o.streamed.rows, y);
    else
      mask_items(p.eligible, row, o.resident.rows, first, y);
  }

  static OFFTOWER_DEVICE void load_row_stats(const Params& p, int64_t first, float* vectors) {
    constexpr int kChunks = kBlockN / 4; // of 16 bytes
    for (int i = thread_idx(); i < kRowStats * kChunks; i += block_dim()) {
      const int which = i / kChunks, chunk = i % kChunks;
      cp_async_zfill(vectors + which * kBlockN + chunk * 4,
                     p.stats + which * p.padded_contexts + first + chunk * 4, true);
    }
  }
};

} // namespace offtower::cuda
