// Epilogue of the forward pass: online softmax sums of a warp's rows.
//
// Each thread keeps sums over its own columns; the four threads of a row merge theirs at the end. Sums of
// kPromotionInterval tiles are float32 and then promoted to float64, so that rounding errors do not grow
// with the number of items. The target's score is taken from the accumulator that also enters the
// normalizer, so log_prob <= 0 holds exactly.
#pragma once

#include "eligible.h"

namespace offtower::cuda {

// Sums over the items of a split, relative to a running maximum; y in units of log 2.
struct RowSums {
  double total, reward, centered; // sum_j 2^(y_j - reference_max) (1, q_j, y_j - reference_max)
  float reference_max;
  int unused;
};

struct ForwardParams {
  PolicyParams policy;
  const int64_t* action; // or null
  RowSums* sums;         // (splits, contexts)
  float* target_score;   // (contexts,): y of the logged item, where it is among the items
  float* target_reward;
  EligibleParams eligible; // of masked kernels
};

// `reference_max` must not be below that of the sums.
OFFTOWER_DEVICE void rescale(RowSums& s, float reference_max) {
  if (s.reference_max == reference_max) return;
  const double shift = static_cast<double>(s.reference_max) - reference_max;
  // Empty sums have reference_max = -inf, and 0 * -inf would be NaN.
  const double factor = s.total == 0.0 ? 0.0 : exp2(shift);
  s.centered = s.total == 0.0 ? 0.0 : factor * (s.centered + s.total * shift);
  s.total *= factor;
  s.reward *= factor;
  s.reference_max = reference_max;
}

OFFTOWER_DEVICE void merge(RowSums& s, RowSums other) {
  const float reference_max = max(s.reference_max, other.reference_max);
  rescale(s, reference_max);
  rescale(other, reference_max);
  s.total += other.total;
  s.reward += other.reward;
  s.centered += other.centered;
}

// Merges the sums of groups of `lanes` neighboring threads, a power of 2. All of them get the same bits.
OFFTOWER_DEVICE void merge_lanes(RowSums& s, int lanes) {
  OFFTOWER_UNROLL
  for (int mask = 1; mask < lanes; mask *= 2) {
    RowSums other;
    other.total = shfl_xor_sync(s.total, mask);
    other.reward = shfl_xor_sync(s.reward, mask);
    other.centered = shfl_xor_sync(s.centered, mask);
    other.reference_max = shfl_xor_sync(s.reference_max, mask);
    merge(s, other);
  }
}

// kMmaM fragments of 16 rows, tiles of kMmaN fragments of 8 columns.
template <class T, int kMmaM, int kMmaN, Reward kReward, bool kEntropy>
class OnlineSoftmax {
public:
  static constexpr int kBlockN = kMmaN * 8;
  static constexpr int kRewardMmaN = kReward == Reward::none ? 1 : kMmaN;
  static_assert(kMmaN % 2 == 0,
                "sigmoid4 takes the four columns that a thread has in two fragments");

  OFFTOWER_DEVICE OnlineSoftmax(const ForwardParams& params, int64_t first_row)
      : p(params), row(first_row) {
    OFFTOWER_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      sums[r] = {0.0, 0.0, 0.0, -infinity(), 0};
      total[r] = reward[r] = centered[r] = 0.0f;
      const int64_t i = row_of(r);
      target[r] = -1;
      if (p.action != nullptr && i < p.policy.resident.rows) {
        const int64_t action = p.action[i];
        if (action < p.policy.items) target[r] = action;
      }
    }
  }

  // Adds a tile whose first item is `first`. `bias` holds its logit biases, then its reward biases. The
  // accumulators y and q are overwritten.
  OFFTOWER_DEVICE void add(int64_t first, const float* bias, float (&y)[kMmaM][kMmaN][4],
                           float (&q)[kMmaM][kRewardMmaN][4]) {
    const PolicyParams& o = p.policy;
    const int t = lane_idx() % 4;
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaN; ++n) {
      OFFTOWER_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + 2 * t + c;
        OFFTOWER_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) {
          float& score = y[r / 2][n][r % 2 * 2 + c];
          score = fma(score, o.scale, bias[column]);
          if constexpr (kReward != Reward::none) {
            float& value = q[r / 2][n][r % 2 * 2 + c];
            if constexpr (kReward == Reward::dense) {
              const bool inside = row_of(r) < o.resident.rows && first + column < o.items;
              value = inside ? to_float(static_cast<const T*>(
                                   o.dense)[row_of(r) * o.items + first + column])
                             : 0.0f;
            } else {
              value += bias[kBlockN + column];
            }
          }
        }
      }
    }
    if (kReward == Reward::factored && o.sigmoid) {
      OFFTOWER_UNROLL
      for (int n = 0; n < kRewardMmaN - 1; n += 2) {
        // One row at a time, so that a NaN stays in its row.
        OFFTOWER_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) {
          const int m = r / 2, e = r % 2 * 2;
          sigmoid4(q[m][n][e], q[m][n][e + 1], q[m][n + 1][e], q[m][n + 1][e + 1]);
        }
      }
    }
    store_target(first, y, q);
    OFFTOWER_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) add_row(r, y, q);
    if (++tiles % kPromotionInterval == 0) {
      OFFTOWER_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) promote(r);
    }
  }

  OFFTOWER_DEVICE void write(int split) {
    OFFTOWER_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      promote(r);
      merge_lanes(sums[r], 4);
      mark_divergence();
      if (lane_idx() % 4 == 0 && row_of(r) < p.policy.resident.rows)
        p.sums[split * p.policy.resident.rows + row_of(r)] = sums[r];
    }
  }

private:
  static constexpr int kRowsPerThread = kMmaM * 2;
  static constexpr int kPromotionInterval = 16; // tiles

  // Row r of a thread: r / 2 is the fragment, r % 2 its upper or lower half.
  OFFTOWER_DEVICE int64_t row_of(int r) const {
    return row + r / 2 * kAtomM + r % 2 * 8 + lane_idx() / 4;
  }

  OFFTOWER_DEVICE void store_target(int64_t first, const float (&y)[kMmaM][kMmaN][4],
                                    const float (&q)[kMmaM][kRewardMmaN][4]) const {
    bool any = false;
    OFFTOWER_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r)
      any |= target[r] >= first && target[r] < first + kBlockN;
    if (ballot_sync(any) == 0) return; // at N = 1e6 and 64 columns, all but 0.2 % of a warp's tiles
    mark_divergence();
    const int column = lane_idx() % 4 * 2;
    OFFTOWER_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int64_t at = target[r] - first - column; // 8 n + c in the thread that holds it
      float score = 0.0f, value = 0.0f;
      bool mine = false;
      // Selects rather than indexing: accumulators indexed at run time would be spilled to local memory.
      OFFTOWER_UNROLL
      for (int n = 0; n < kMmaN; ++n) {
        OFFTOWER_UNROLL
        for (int c = 0; c < 2; ++c) {
          const bool here = at == n * 8 + c;
          mine |= here;
          score = here ? y[r / 2][n][r % 2 * 2 + c] : score;
          if constexpr (kReward != Reward::none) value = here ? q[r / 2][n][r % 2 * 2 + c] : value;
        }
      }
      if (!mine) continue;
      p.target_score[row_of(r)] = score;
      if constexpr (kReward != Reward::none) p.target_reward[row_of(r)] = value;
    }
  }

  OFFTOWER_DEVICE void add_row(int r, const float (&y)[kMmaM][kMmaN][4],
                               const float (&q)[kMmaM][kRewardMmaN][4]) {
    const int m = r / 2, e = r % 2 * 2;
    float row_max = y[m][0][e];
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaN; ++n) row_max = max(row_max, max(y[m][n][e], y[m][n][e + 1]));
    if (row_max > sums[r].reference_max) { // rare after the first tiles
      promote(r);
      rescale(sums[r], row_max);
    }
    const float reference_max = sums[r].reference_max == -infinity() ? 0.0f : sums[r].reference_max;
    float sum_w = 0.0f, sum_wq = 0.0f, sum_wy = 0.0f;
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaN; ++n) {
      OFFTOWER_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float centered_y = y[m][n][e + c] - reference_max;
        const float w = ex2_approx(centered_y);
        sum_w += w;
        if constexpr (kReward != Reward::none) sum_wq = fma(w, q[m][n][e + c], sum_wq);
        if constexpr (kEntropy) sum_wy = fma(w, max(centered_y, kLogProbFloor), sum_wy);
      }
    }
    total[r] += sum_w;
    if constexpr (kReward != Reward::none) reward[r] += sum_wq;
    if constexpr (kEntropy) centered[r] += sum_wy;
  }

  OFFTOWER_DEVICE void promote(int r) {
    sums[r].total += total[r];
    sums[r].reward += reward[r];
    sums[r].centered += centered[r];
    total[r] = reward[r] = centered[r] = 0.0f;
  }

  const ForwardParams& p;
  const int64_t row;
  RowSums sums[kRowsPerThread];
  float total[kRowsPerThread], reward[kRowsPerThread], centered[kRowsPerThread];
  int64_t target[kRowsPerThread];
  int tiles = 0;
};

} // namespace offtower::cuda
