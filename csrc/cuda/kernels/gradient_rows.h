// What a warp does with the scores of its 16 rows in the backward pass: ds from them, and at the end
// the sums  sum_i = sum_j ds_ij y_j,  which the caller's products have gathered.
//
// ds_ij = pi_ij (base_i + reward_i (q_ij - m_i) - entropy_i log pi_ij) for context i, all over the
// row's total; the 1[j = a_i] part of dv and db is added in float32 where a tile shows an item of
// the warp (du gets its own in the last step, from the merged sums).
#pragma once

#include "products.h"

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

// `kItemsStay`: dv, with contexts in the columns; else du, with items there.
template <class T, bool kItemsStay, Reward kReward, int kTiles, int kWidthTiles>
class GradientRows {
public:
  static constexpr int kColumns = kTiles * 8, kRows = kWarpRows;
  static constexpr int kRewardTiles = kReward == Reward::factored ? kTiles : 1;
  static constexpr int kVectors = kItemsStay ? kRowStats : 2;

  OFFTOWER_DEVICE GradientRows(const GradientProblem& params, int64_t first_row, int split_of_block)
      : p(params), row(first_row), split(split_of_block) {
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

  // From the products of a tile, whose first column is number `first` of the stream, to ds in `y`.
  // `vectors`: of its columns, either kRowStats arrays or biases as for the forward pass. `q` is used
  // up.
  OFFTOWER_DEVICE void cotangents(int64_t first, const float* vectors, float (&y)[kTiles][4],
                                  float (&q)[kRewardTiles][4]) {
    if constexpr (kReward == Reward::factored) finish_rewards(vectors, q);
    if (p.entropy) weigh_scores<true>(first, vectors, y, q);
    else weigh_scores<false>(first, vectors, y, q);
    if (kItemsStay && p.bias_partial != nullptr) {
      OFFTOWER_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        OFFTOWER_UNROLL
        for (int e = 0; e < 4; ++e) bias_sum[e / 2] += y[n][e];
      }
    }
  }

  // 1[j = a_i] of contexts in the tile whose item is one of the warp's; `context(column, k)` are
  // numbers k and k + 1 of the tile's context.
  template <class Context>
  OFFTOWER_DEVICE void add_own(const float* vectors, Context context) {
    OFFTOWER_UNROLL
    for (int part = 0; part < kColumns; part += 32) {
      const int action = static_cast<int>(bits_of_float(vectors[kActionStat * kColumns + part + lane_index()]));
      const int64_t offset = action - row;
      uint32_t shown = ballot(action >= 0 && offset >= 0 && offset < kRows);
      while (shown != 0) { // as good as never at a million items
        const int column = part + lowest_bit(shown);
        shown &= shown - 1;
        const int lane = only_here(lane_index()), g = lane / 4, t = lane % 4;
        const int64_t at =
            static_cast<int64_t>(static_cast<int>(bits_of_float(vectors[kActionStat * kColumns + column]))) - row;
        const float cotangent = vectors[kOwnStat * kColumns + column];
        OFFTOWER_UNROLL
        for (int h = 0; h < 2; ++h) {
          if (at != h * 8 + g) continue;
          if (t == 0) bias_sum[h] += cotangent;
          OFFTOWER_UNROLL
          for (int n = 0; n < kWidthTiles; ++n) {
            const Float2 u = context(column, n * 8 + 2 * t);
            sum[n][h * 2] = fused(cotangent, u.x[0], sum[n][h * 2]);
            sum[n][h * 2 + 1] = fused(cotangent, u.x[1], sum[n][h * 2 + 1]);
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

  float sum[kWidthTiles][4];

private:
  // What the gradient needs of one context.
  struct Stats {
    float anchor, base, reward, expected, entropy, log_total;
  };

  OFFTOWER_DEVICE int64_t row_of(int h) const { return row + h * 8 + lane_index() / 4; }

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

  OFFTOWER_DEVICE void finish_rewards(const float* vectors, float (&q)[kRewardTiles][4]) const {
    const int t = lane_index() % 4;
    OFFTOWER_UNROLL
    for (int n = 0; n < kRewardTiles; ++n) {
      OFFTOWER_UNROLL
      for (int e = 0; e < 4; ++e)
        q[n][e] += kItemsStay ? reward_bias[e / 2] : vectors[kColumns + n * 8 + 2 * t + e % 2];
    }
    if (!p.policy.sigmoid) return;
    // Contexts that stay keep their NaNs to themselves; items that stay sum over all contexts anyway.
    OFFTOWER_UNROLL
    for (int n = 0; n < kRewardTiles - 1; n += 2) {
      OFFTOWER_UNROLL
      for (int h = 0; h < 2; ++h) {
        if constexpr (kItemsStay) to_sigmoids(q[n + h][0], q[n + h][1], q[n + h][2], q[n + h][3]);
        else to_sigmoids(q[n][2 * h], q[n][2 * h + 1], q[n + 1][2 * h], q[n + 1][2 * h + 1]);
      }
    }
  }

  template <bool kEntropy>
  OFFTOWER_DEVICE void weigh_scores(int64_t first, const float* vectors, float (&y)[kTiles][4],
                                    const float (&q)[kRewardTiles][4]) const {
    const int t = lane_index() % 4;
    OFFTOWER_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      OFFTOWER_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + 2 * t + c;
        OFFTOWER_UNROLL
        for (int h = 0; h < 2; ++h) {
          float& score = y[n][h * 2 + c];
          const Stats g = kItemsStay ? stats_of_column(vectors, column) : stats[h];
          const float below =
              fused(score, p.policy.scale, kItemsStay ? bias[h] : vectors[column]) - g.anchor;
          float factor = g.base;
          if constexpr (kReward == Reward::dense)
            factor = fused(g.reward, dense(first + column, h) - g.expected, factor);
          if constexpr (kReward == Reward::factored)
            factor = fused(g.reward, q[n][h * 2 + c] - g.expected, factor);
          if constexpr (kEntropy)
            factor = fused(-g.entropy, fused(larger(below, kNoMass), kLn2, -g.log_total), factor);
          score = fast_exp2(below) * factor;
        }
      }
    }
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

  const GradientProblem& p;
  const int64_t row;
  const int split;
  bool flushed = false;
  float bias_sum[2], bias[2], reward_bias[2]; // of items that stay
  Stats stats[2];                             // of contexts that stay
};

} // namespace offtower::cuda
