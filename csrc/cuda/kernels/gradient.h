// Gradients, once for either side: scores again, ds from them, and  sum_i = sum_j ds_ij y_j  for the
// rows i that stay. du: contexts stay and items stream. dv: items stay and contexts stream.
//
// ds_ij = pi_ij (base_i + reward_i (q_ij - m_i) - entropy_i log pi_ij) for context i, all over the
// row's total; the 1[j = a_i] part of dv and db is added in float32 where a tile shows an item of
// the block (du gets its own in the last step, from the merged sums).
#pragma once

#include "stream.h"

namespace offtower::cuda {

struct GradientProblem {
  Problem policy;
  const float* stats; // [kRowStats][padded contexts], see RowStat
  int64_t padded_contexts;
  bool entropy, own;    // whether the cotangents of entropy and of log_prob are there
  float output_scale;   // 1 / temperature
  void* gradient;       // (rows that stay, width) of T, where there is one split of items that stay
  float* partial;       // else (splits, rows that stay, width)
  float* bias_partial;  // (splits, items) sum of ds, or null; items stay
};

template <class T, bool kItemsStay, Reward kReward, int kWidth>
struct Gradient {
  using Params = GradientProblem;
  static constexpr int kColumns = Tiling<T>::kColumns, kTiles = kColumns / 8;
  static constexpr int kRows = kWarpRows, kMostThreads = 256, kBlocks = 1;
  static constexpr int kVectors = kItemsStay ? kRowStats : 2;
  static constexpr int kScratch =
      sizeof(T) == 4 ? kWarpRows * kScratchPitch<kTiles> * 4 : 0;
  static constexpr int kWidthTiles = kWidth / 8;
  static constexpr int kFlush = sizeof(T) == 4 ? 64 : 512; // tiles whose sums stay in registers

  static OFFTOWER_DEVICE void run(const Params& p, char* shared) {
    const Problem& o = p.policy;
    const int warps = thread_count() / 32, rows = warps * kRows;
    const SharedLayout l = shared_layout(sizeof(T), kColumns, rows, kWidth, o.reward_stay.width,
                                         kVectors, o.stages, kScratch, warps);
    const Share share = share_of_block<T>(o, rows);
    Gradient self(p, share.first_row + warp_index() * kRows,
                  shared + l.scratch + warp_index() * kScratch, share.split);
    int count = 0;
    for_each_tile<T>(
        o, l, share, rows, shared,
        [&](int64_t first, float* vectors) { self.load_vectors(first, vectors); },
        [&](int64_t first, const char* stage) {
          self.tile(shared, l, first, stage);
          if (++count % kFlush == 0 && p.gradient == nullptr) self.flush();
        });
    self.write();
  }

private:
  // What the gradient needs of one context.
  struct Stats {
    float anchor, base, reward, expected, entropy, log_total;
  };

  OFFTOWER_DEVICE Gradient(const Params& params, int64_t first_row, char* warp_scratch, int split_)
      : p(params), row(first_row), scratch(warp_scratch), split(split_), flushed(false) {
    OFFTOWER_UNROLL
    for (int n = 0; n < kWidthTiles; ++n) {
      OFFTOWER_UNROLL
      for (int e = 0; e < 4; ++e) sum[n][e] = 0.0f;
    }
    OFFTOWER_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int64_t i = row_of(h);
      bias_sum[h] = bias[h] = reward_bias[h] = 0.0f;
      if constexpr (kItemsStay) {
        if (i < p.policy.items && p.policy.item_bias != nullptr)
          bias[h] = to_float(static_cast<const T*>(p.policy.item_bias)[i]) * kLog2E;
        if (i < p.policy.items && p.policy.reward_bias != nullptr)
          reward_bias[h] = to_float(static_cast<const T*>(p.policy.reward_bias)[i]);
      } else {
        // Contexts are padded with an infinite anchor, which leaves them no mass.
        const int64_t at = least(i, p.padded_contexts - 1);
        const auto stat = [&](RowStat which) { return p.stats[which * p.padded_contexts + at]; };
        stats[h] = {stat(kAnchorStat), stat(kBaseStat), stat(kRewardStat),
                    stat(kExpectedStat), stat(kEntropyStat), stat(kLogTotalStat)};
      }
    }
  }

  OFFTOWER_DEVICE int64_t row_of(int h) const { return row + h * 8 + lane_index() / 4; }

  OFFTOWER_DEVICE void load_vectors(int64_t first, float* vectors) {
    if constexpr (!kItemsStay) load_item_biases<T>(p.policy, first, vectors, kLog2E);
    else {
      // Tiles end within the padding.
      constexpr int kPieces = kColumns / 4;
      for (int i = thread_index(); i < kRowStats * kPieces; i += thread_count()) {
        const int which = i / kPieces, piece = i % kPieces;
        copy_async(vectors + which * kColumns + piece * 4,
                   p.stats + which * p.padded_contexts + first + piece * 4, true);
      }
    }
  }

  OFFTOWER_DEVICE void tile(const char* shared, const SharedLayout& l, int64_t first,
                            const char* stage) {
    const Problem& o = p.policy;
    const float* vectors = reinterpret_cast<const float*>(stage + l.vectors);
    const int mine = warp_index() * kRows, t = lane_index() % 4;
    float y[1][kTiles][4], q[1][kReward == Reward::none ? 1 : kTiles][4];
    scores<1, kTiles>(T{}, shared + l.stay + mine * l.stay_pitch, stage, l.stay_pitch,
                      static_cast<int>(ceil_div(o.stay.width * static_cast<int>(sizeof(T)), kStep)), y);
    if constexpr (kReward == Reward::factored)
      scores<1, kTiles>(T{}, shared + l.reward_stay + mine * l.reward_pitch,
                        stage + l.reward_stream, l.reward_pitch, (l.reward_pitch - 16) / kStep, q);
    OFFTOWER_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      OFFTOWER_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + 2 * t + c;
        OFFTOWER_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int e = h * 2 + c;
          const Stats g = kItemsStay ? stats_of_column(vectors, column) : stats[h];
          const float score =
              fused(y[0][n][e], o.scale, kItemsStay ? bias[h] : vectors[column]);
          float value = 0.0f;
          if constexpr (kReward == Reward::dense) value = dense(first + column, h);
          if constexpr (kReward == Reward::factored) {
            value = q[0][n][e] + (kItemsStay ? reward_bias[h] : vectors[kColumns + column]);
            if (o.sigmoid) value = sigmoid(value);
          }
          const float ds = cotangent(score, value, g);
          y[0][n][e] = ds;
          if constexpr (kItemsStay) bias_sum[h] += ds;
        }
      }
    }
    weigh<kTiles, kWidthTiles>(T{}, y[0], stage, l.stay_pitch, scratch, sum);
    if constexpr (kItemsStay) {
      if (p.own) add_own(vectors, stage, l);
    }
  }

  static OFFTOWER_DEVICE Stats stats_of_column(const float* vectors, int column) {
    const auto stat = [&](RowStat which) { return vectors[which * kColumns + column]; };
    return {stat(kAnchorStat), stat(kBaseStat), stat(kRewardStat), stat(kExpectedStat), stat(kEntropyStat), stat(kLogTotalStat)};
  }

  OFFTOWER_DEVICE float dense(int64_t streamed, int h) const {
    const int64_t context = kItemsStay ? streamed : row_of(h), item = kItemsStay ? row_of(h) : streamed;
    const int64_t contexts = kItemsStay ? p.policy.stream.rows : p.policy.stay.rows;
    if (context >= contexts || item >= p.policy.items) return 0.0f;
    return to_float(static_cast<const T*>(p.policy.dense)[context * p.policy.items + item]);
  }

  OFFTOWER_DEVICE float cotangent(float score, float value, const Stats& g) const {
    const float below = score - g.anchor;
    float factor = g.base;
    if constexpr (kReward != Reward::none) factor = fused(g.reward, value - g.expected, factor);
    if (p.entropy)
      factor = fused(-g.entropy, fused(larger(below, kNoMass), kLn2, -g.log_total), factor);
    return fast_exp2(below) * factor;
  }

  // 1[j = a_i] of contexts in the tile whose item is one of the warp's.
  OFFTOWER_DEVICE void add_own(const float* vectors, const char* stage, const SharedLayout& l) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    OFFTOWER_UNROLL
    for (int part = 0; part < kColumns; part += 32) {
      const int action = static_cast<int>(bits_of_float(vectors[kActionStat * kColumns + part + lane_index()]));
      const int64_t offset = action - row;
      uint32_t shown = ballot(action >= 0 && offset >= 0 && offset < kRows);
      while (shown != 0) { // as good as never at a million items
        const int column = part + lowest_bit(shown);
        shown &= shown - 1;
        const int64_t at =
            static_cast<int64_t>(static_cast<int>(bits_of_float(vectors[kActionStat * kColumns + column]))) - row;
        const float cotangent = vectors[kOwnStat * kColumns + column];
        const T* context = reinterpret_cast<const T*>(stage + column * l.stay_pitch);
        OFFTOWER_UNROLL
        for (int h = 0; h < 2; ++h) {
          if (at != h * 8 + g) continue;
          if (t == 0) bias_sum[h] += cotangent;
          OFFTOWER_UNROLL
          for (int n = 0; n < kWidthTiles; ++n) {
            OFFTOWER_UNROLL
            for (int c = 0; c < 2; ++c)
              sum[n][h * 2 + c] =
                  fused(cotangent, to_float(context[n * 8 + 2 * t + c]), sum[n][h * 2 + c]);
          }
        }
      }
    }
  }

  // Registers to the partial sums: a long sum in the tensor cores' accumulators would lose digits.
  OFFTOWER_DEVICE void flush() {
    float* const partial = p.partial + split * p.policy.stay.rows * p.policy.stay.width;
    for_each_element(partial, [&](float* at, float& value) {
      *at = flushed ? *at + value : value;
      value = 0.0f;
    });
    flushed = true;
  }

  // Calls `visit(address in `array` (rows that stay, width), sum)` for what this thread holds.
  template <class Out, class Visit>
  OFFTOWER_DEVICE void for_each_element(Out* array, Visit visit) {
    const int width = p.policy.stay.width, column = lane_index() % 4 * 2;
    OFFTOWER_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (row_of(h) >= p.policy.stay.rows) continue;
      Out* const at = array + row_of(h) * width + column;
      OFFTOWER_UNROLL
      for (int n = 0; n < kWidthTiles; ++n) {
        if (n * 8 + column >= width) break;
        OFFTOWER_UNROLL
        for (int c = 0; c < 2; ++c) visit(at + n * 8 + c, sum[n][h * 2 + c]);
      }
    }
  }

  OFFTOWER_DEVICE void write() {
    if (p.gradient != nullptr)
      for_each_element(static_cast<T*>(p.gradient), [&](T* at, float& value) {
        *at = from_float<T>(value * p.output_scale);
      });
    else if (p.partial != nullptr) flush();
    if constexpr (kItemsStay) {
      OFFTOWER_UNROLL
      for (int h = 0; h < 2; ++h) {
        bias_sum[h] += shuffle_xor(bias_sum[h], 1);
        bias_sum[h] += shuffle_xor(bias_sum[h], 2);
        if (p.bias_partial != nullptr && lane_index() % 4 == 0 && row_of(h) < p.policy.items)
          p.bias_partial[split * p.policy.items + row_of(h)] = bias_sum[h];
      }
    }
  }

  const Params& p;
  const int64_t row;
  char* const scratch;
  const int split;
  bool flushed;
  float sum[kWidthTiles][4];
  float bias_sum[2], bias[2], reward_bias[2]; // of items that stay
  Stats stats[2];                             // of contexts that stay
};

} // namespace offtower::cuda
