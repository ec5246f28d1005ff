// Backward pass of a warp's 16 rows: score gradients ds from recomputed scores, and the accumulators of
// the weighted sums  sum_j ds_ij y_j  that become du or dv.
//
// With p_ij = 2^(y_ij - reference_max_i) / total_i, and cotangents g of the terms of context i:
//   ds_ij = p_ij (base_i + g_reward_i (q_ij - E_i[q]) - g_entropy_i log p_ij) + g_log_prob_i 1[j = a_i],
//   base_i = g_log_normalizer_i - g_log_prob_i - g_entropy_i entropy_i.
// The last term is added in float32: to dv and db where a tile holds a target of the warp's items, to du
// when the splits are reduced.
#pragma once

#include "eligible.h"

namespace offtower::cuda {

struct GradientParams {
  PolicyParams policy;
  const float* stats; // [kRowStats][padded_contexts], see RowStat
  int64_t padded_contexts;
  bool has_entropy, has_log_prob; // cotangents
  float output_scale;             // 1 / temperature
  void* gradient;      // (resident rows, width) of T, if items are resident and there is one split
  float* partial;      // else (splits, resident rows, width)
  float* bias_partial; // (splits, items) sums of ds, or null; if items are resident
  EligibleParams eligible; // of masked kernels
};

template <class T, bool kItemsResident, Reward kReward, int kMmaN, int kMmaD>
class ScoreGradient {
public:
  static constexpr int kBlockN = kMmaN * 8, kWarpM = kAtomM;
  static constexpr int kRewardMmaN = kReward == Reward::factored ? kMmaN : 1;
  static constexpr int kColumnVectors = kItemsResident ? kRowStats : 2;
  static_assert(kMmaN % 2 == 0,
                "sigmoid4 takes the four columns that a thread has in two fragments");
  static_assert(kBlockN % 32 == 0, "add_target reads the actions of 32 columns at once");
  static_assert(kContextPadding % kBlockN == 0,
                "stats of streamed contexts are read by whole tiles");

  OFFTOWER_DEVICE ScoreGradient(const GradientParams& params, int64_t first_row, int split_of_block)
      : p(params), row(first_row), split(split_of_block) {
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaD; ++n) {
      OFFTOWER_UNROLL
      for (int e = 0; e < 4; ++e) sum[n][e] = 0.0f;
    }
    OFFTOWER_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int64_t i = row_of(h);
      bias_sum[h] = bias[h] = reward_bias[h] = 0.0f;
      if constexpr (kItemsResident) {
        if (i < p.policy.items && p.policy.item_bias != nullptr)
          bias[h] = to_float(static_cast<const T*>(p.policy.item_bias)[i]) * kLog2E;
        if (i < p.policy.items && p.policy.reward_bias != nullptr)
          reward_bias[h] = to_float(static_cast<const T*>(p.policy.reward_bias)[i]);
      } else {
        // Padding has reference_max = inf, so that p = 0.
        const int64_t at = min(i, p.padded_contexts - 1);
        stats[h] = stats_at(p.stats, p.padded_contexts, at);
      }
    }
  }

  // From the accumulators y and q of a tile to ds, in y. `first` is its first streamed row; `vectors` are
  // kRowStats arrays of its contexts, or logit and reward biases of its items.
  OFFTOWER_DEVICE void to_score_gradients(int64_t first, const float* vectors, float (&y)[kMmaN][4],
                                          float (&q)[kRewardMmaN][4]) {
    if constexpr (kReward == Reward::factored) finish_rewards(vectors, q);
    if (p.has_entropy)
      to_score_gradients<true>(first, vectors, y, q);
    else
      to_score_gradients<false>(first, vectors, y, q);
    if (kItemsResident && p.bias_partial != nullptr) {
      OFFTOWER_UNROLL
      for (int n = 0; n < kMmaN; ++n) {
        OFFTOWER_UNROLL
        for (int e = 0; e < 4; ++e) bias_sum[e / 2] += y[n][e];
      }
    }
  }

  // Adds g_log_prob_i u_i to the sums of item a_i, for contexts i of the tile whose action is one of the
  // warp's items. `context(column, k)` returns elements k and k + 1 of a context.
  template <class Context>
  OFFTOWER_DEVICE void add_target(const float* vectors, Context context) {
    OFFTOWER_UNROLL
    for (int part = 0; part < kBlockN; part += 32) {
      const int action =
          static_cast<int>(float_as_uint(vectors[kActionStat * kBlockN + part + lane_idx()]));
      const int64_t offset = action - row;
      uint32_t targets = ballot_sync(action >= 0 && offset >= 0 && offset < kWarpM);
      while (targets != 0) { // rare: at N = 1e6 a context meets 16 of a million items here
        const int column = part + count_trailing_zeros(targets);
        targets &= targets - 1;
        const int lane = prevent_hoisting(lane_idx()), g = lane / 4, t = lane % 4;
        const int64_t at = static_cast<int64_t>(static_cast<int>(
                               float_as_uint(vectors[kActionStat * kBlockN + column]))) -
                           row;
        const float cotangent = vectors[kTargetStat * kBlockN + column];
        mark_divergence();
        OFFTOWER_UNROLL
        for (int h = 0; h < 2; ++h) {
          if (at != h * 8 + g) continue;
          if (t == 0) bias_sum[h] += cotangent;
          OFFTOWER_UNROLL
          for (int n = 0; n < kMmaD; ++n) {
            const Float2 u = context(column, n * 8 + 2 * t);
            sum[n][h * 2] = fma(cotangent, u.x[0], sum[n][h * 2]);
            sum[n][h * 2 + 1] = fma(cotangent, u.x[1], sum[n][h * 2 + 1]);
          }
        }
      }
    }
  }

  // Adds the accumulators to the partial sums in memory. Tensor cores truncate where they add, so that
  // long sums in accumulators would lose digits.
  OFFTOWER_DEVICE void flush() {
    float* const partial = p.partial + split * p.policy.resident.rows * p.policy.resident.width;
    for_each_element(partial, [&](float* at, float& value) {
      *at = flushed ? *at + value : value;
      value = 0.0f;
    });
    flushed = true;
  }

  OFFTOWER_DEVICE void write() {
    if (p.gradient != nullptr)
      write_gradient(static_cast<T*>(p.gradient));
    else if (p.partial != nullptr)
      flush();
    if constexpr (kItemsResident) {
      OFFTOWER_UNROLL
      for (int h = 0; h < 2; ++h) {
        bias_sum[h] += shfl_xor_sync(bias_sum[h], 1);
        bias_sum[h] += shfl_xor_sync(bias_sum[h], 2);
        mark_divergence();
        if (p.bias_partial != nullptr && lane_idx() % 4 == 0 && row_of(h) < p.policy.items)
          p.bias_partial[split * p.policy.items + row_of(h)] = bias_sum[h];
      }
    }
  }

  float sum[kMmaD][4];

private:
  struct Stats {
    float reference_max, base, reward, expected, entropy, log_total;
  };

  template <class Index>
  static OFFTOWER_DEVICE Stats stats_at(const float* array, Index stride, Index at) {
    const auto stat = [&](RowStat which) { return array[which * stride + at]; };
    return {stat(kReferenceMaxStat), stat(kBaseStat),    stat(kRewardStat),
            stat(kExpectedStat),     stat(kEntropyStat), stat(kLogTotalStat)};
  }

  OFFTOWER_DEVICE int64_t row_of(int h) const { return row + h * 8 + lane_idx() / 4; }

  OFFTOWER_DEVICE float dense(int64_t streamed, int h) const {
    const int64_t context = kItemsResident ? streamed : row_of(h),
                  item = kItemsResident ? row_of(h) : streamed;
    const int64_t contexts = kItemsResident ? p.policy.streamed.rows : p.policy.resident.rows;
    if (context >= contexts || item >= p.policy.items) return 0.0f;
    return to_float(static_cast<const T*>(p.policy.dense)[context * p.policy.items + item]);
  }

  OFFTOWER_DEVICE void finish_rewards(const float* vectors, float (&q)[kRewardMmaN][4]) const {
    const int t = lane_idx() % 4;
    OFFTOWER_UNROLL
    for (int n = 0; n < kRewardMmaN; ++n) {
      OFFTOWER_UNROLL
      for (int e = 0; e < 4; ++e)
        q[n][e] += kItemsResident ? reward_bias[e / 2] : vectors[kBlockN + n * 8 + 2 * t + e % 2];
    }
    if (!p.policy.sigmoid) return;
    // du: one context at a time, so that a NaN stays in its row. dv sums over all contexts anyway.
    OFFTOWER_UNROLL
    for (int n = 0; n < kRewardMmaN - 1; n += 2) {
      OFFTOWER_UNROLL
      for (int h = 0; h < 2; ++h) {
        if constexpr (kItemsResident)
          sigmoid4(q[n + h][0], q[n + h][1], q[n + h][2], q[n + h][3]);
        else
          sigmoid4(q[n][2 * h], q[n][2 * h + 1], q[n + 1][2 * h], q[n + 1][2 * h + 1]);
      }
    }
  }

  template <bool kEntropy>
  OFFTOWER_DEVICE void to_score_gradients(int64_t first, const float* vectors, float (&y)[kMmaN][4],
                                          const float (&q)[kRewardMmaN][4]) const {
    const int t = lane_idx() % 4;
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaN; ++n) {
      OFFTOWER_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + 2 * t + c;
        OFFTOWER_UNROLL
        for (int h = 0; h < 2; ++h) {
          float& score = y[n][h * 2 + c];
          const Stats g = kItemsResident ? stats_at(vectors, kBlockN, column) : stats[h];
          const float centered_y =
              fma(score, p.policy.scale, kItemsResident ? bias[h] : vectors[column]) -
              g.reference_max;
          float factor = g.base;
          if constexpr (kReward == Reward::dense)
            factor = fma(g.reward, dense(first + column, h) - g.expected, factor);
          if constexpr (kReward == Reward::factored)
            factor = fma(g.reward, q[n][h * 2 + c] - g.expected, factor);
          if constexpr (kEntropy)
            factor =
                fma(-g.entropy, fma(max(centered_y, kLogProbFloor), kLn2, -g.log_total), factor);
          score = ex2_approx(centered_y) * factor;
        }
      }
    }
  }

  template <class Out>
  OFFTOWER_DEVICE void write_gradient(Out* gradient) {
    for_each_element(gradient,
                     [&](Out* at, float& value) { *at = from_float<Out>(value * p.output_scale); });
  }

  // 16 bytes a store where rows are multiples of that: the four threads of a row exchange pairs of
  // columns of four fragments, so that each has the eight columns of one.
  OFFTOWER_DEVICE void write_gradient(Bfloat16* gradient) {
    const int width = p.policy.resident.width, t = lane_idx() % 4;
    const bool aligned = width % 8 == 0 && reinterpret_cast<uintptr_t>(gradient) % 16 == 0;
    if (kMmaD % 4 != 0 || !aligned) return write_gradient<Bfloat16>(gradient);
    OFFTOWER_UNROLL
    for (int h = 0; h < 2; ++h) {
      OFFTOWER_UNROLL
      for (int first = 0; first + 4 <= kMmaD; first += 4) {
        Uint4 pairs;
        OFFTOWER_UNROLL
        for (int n = 0; n < 4; ++n) {
          const float* const f = &sum[first + n][h * 2];
          pairs.x[n] = cvt_bf16x2(f[0] * p.output_scale, f[1] * p.output_scale);
        }
        transpose_quad(pairs.x);
        const int column = (first + t) * 8;
        mark_divergence();
        if (row_of(h) < p.policy.resident.rows && column < width)
          *reinterpret_cast<Uint4*>(gradient + row_of(h) * width + column) = pairs;
        syncwarp();
      }
    }
  }

  // Calls `visit(address in array (resident rows, width), accumulator)`.
  template <class Out, class Visit>
  OFFTOWER_DEVICE void for_each_element(Out* array, Visit visit) {
    const int width = p.policy.resident.width, column = lane_idx() % 4 * 2;
    mark_divergence();
    OFFTOWER_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (row_of(h) >= p.policy.resident.rows) continue;
      Out* const at = array + row_of(h) * width + column;
      OFFTOWER_UNROLL
      for (int n = 0; n < kMmaD; ++n) {
        if (n * 8 + column >= width) break;
        OFFTOWER_UNROLL
        for (int c = 0; c < 2; ++c) visit(at + n * 8 + c, sum[n][h * 2 + c]);
      }
    }
  }

  const GradientParams& p;
  const int64_t row;
  const int split;
  bool flushed = false;
  float bias_sum[2], bias[2], reward_bias[2]; // of resident items
  Stats stats[2];                             // of resident contexts
};

} // namespace offtower::cuda
