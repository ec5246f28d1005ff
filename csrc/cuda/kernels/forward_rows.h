// What a warp does with the scores of its rows in the forward pass: each thread keeps online sums over
// its own columns, and the four threads of a row merge theirs at the end.
//
// Short sums are float32, then float64, so that errors do not grow with the number of items. The
// row's own logit is taken out of the very product that goes into its normalizer.
#pragma once

#include "products.h"

namespace offtower::cuda {

// Sums of one context over a split, relative to its anchor; y in units of log 2.
struct RowSums {
  double total, reward, centred; // sum 2^(y - anchor) (1, q, y - anchor)
  float anchor;
  int unused;
};

struct ForwardProblem {
  Problem policy;
  const int64_t* action; // or null
  RowSums* sums;         // (splits, contexts)
  float* own_score;      // (contexts,): y of the row's action, where it is among the items
  float* own_reward;
};

OFFTOWER_BOTH RowSums nothing_summed(float no_anchor) { return {0.0, 0.0, 0.0, no_anchor, 0}; }

// Relative to another anchor that is not below.
OFFTOWER_DEVICE void move_anchor(RowSums& s, float anchor) {
  if (s.anchor == anchor) return;
  const double shift = static_cast<double>(s.anchor) - anchor;
  // Before the first item there is nothing to move, and the shift is -inf.
  const double factor = s.total == 0.0 ? 0.0 : exp2_of(shift);
  s.centred = s.total == 0.0 ? 0.0 : factor * (s.centred + s.total * shift);
  s.total *= factor;
  s.reward *= factor;
  s.anchor = anchor;
}

OFFTOWER_DEVICE void merge(RowSums& s, RowSums other) {
  const float anchor = larger(s.anchor, other.anchor);
  move_anchor(s, anchor);
  move_anchor(other, anchor);
  s.total += other.total;
  s.reward += other.reward;
  s.centred += other.centred;
}

// Rows of a warp, kFragments of 16, and tiles of kTiles fragments of columns.
template <class T, int kTiles, int kFragments, Reward kReward, bool kEntropy>
class ForwardRows {
public:
  static constexpr int kColumns = kTiles * 8;
  static constexpr int kRewardTiles = kReward == Reward::factored || kReward == Reward::dense ? kTiles : 1;

  OFFTOWER_DEVICE ForwardRows(const ForwardProblem& params, int64_t first_row) : p(params), row(first_row) {
    OFFTOWER_UNROLL
    for (int r = 0; r < kHeld; ++r) {
      sums[r] = nothing_summed(-infinity());
      total[r] = reward[r] = centred[r] = 0.0f;
      const int64_t i = row_of(r);
      own[r] = -1;
      if (p.action != nullptr && i < p.policy.stay.rows) {
        const int64_t action = p.action[i];
        if (action < p.policy.items) own[r] = action;
      }
    }
  }

  // The products of a tile whose first item is `first`; `bias`: of its items, in units of log 2, then
  // those of their rewards. Both arrays of products are used up.
  OFFTOWER_DEVICE void add(int64_t first, const float* bias, float (&y)[kFragments][kTiles][4],
                           float (&q)[kFragments][kRewardTiles][4]) {
    const Problem& o = p.policy;
    const int t = lane_index() % 4;
    OFFTOWER_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      OFFTOWER_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + 2 * t + c;
        OFFTOWER_UNROLL
        for (int r = 0; r < kHeld; ++r) {
          float& score = y[r / 2][n][r % 2 * 2 + c];
          score = fused(score, o.scale, bias[column]);
          if constexpr (kReward != Reward::none) {
            float& value = q[r / 2][n][r % 2 * 2 + c];
            if constexpr (kReward == Reward::dense) {
              const bool inside = row_of(r) < o.stay.rows && first + column < o.items;
              value = inside ? to_float(static_cast<const T*>(
                                   o.dense)[row_of(r) * o.items + first + column])
                             : 0.0f;
            } else {
              value += bias[kColumns + column];
            }
          }
        }
      }
    }
    if (kReward == Reward::factored && o.sigmoid) {
      OFFTOWER_UNROLL
      for (int n = 0; n < kRewardTiles - 1; n += 2) {
        OFFTOWER_UNROLL
        for (int r = 0; r < kHeld; ++r) { // four of one context
          const int m = r / 2, e = r % 2 * 2;
          to_sigmoids(q[m][n][e], q[m][n][e + 1], q[m][n + 1][e], q[m][n + 1][e + 1]);
        }
      }
    }
    keep_own(first, y, q);
    OFFTOWER_UNROLL
    for (int r = 0; r < kHeld; ++r) add_row(r, y, q);
    if (++tiles % kFold == 0) fold();
  }

  OFFTOWER_DEVICE void fold() {
    OFFTOWER_UNROLL
    for (int r = 0; r < kHeld; ++r) fold(r);
  }

  OFFTOWER_DEVICE void write(int split) {
    OFFTOWER_UNROLL
    for (int r = 0; r < kHeld; ++r) {
      fold(r);
      OFFTOWER_UNROLL
      for (int mask = 1; mask < 4; mask *= 2) {
        RowSums other;
        other.total = shuffle_xor(sums[r].total, mask);
        other.reward = shuffle_xor(sums[r].reward, mask);
        other.centred = shuffle_xor(sums[r].centred, mask);
        other.anchor = shuffle_xor(sums[r].anchor, mask);
        merge(sums[r], other);
      }
      if (lane_index() % 4 == 0 && row_of(r) < p.policy.stay.rows)
        p.sums[split * p.policy.stay.rows + row_of(r)] = sums[r];
    }
  }

private:
  static constexpr int kHeld = kFragments * 2; // rows of a thread
  static constexpr int kFold = 16;             // tiles whose sums are float32

  // Rows of a thread, counted as fragments hold them: elements 0, 1 and 2, 3 of each.
  OFFTOWER_DEVICE int64_t row_of(int r) const {
    return row + r / 2 * kWarpRows + r % 2 * 8 + lane_index() / 4;
  }

  OFFTOWER_DEVICE void keep_own(int64_t first, const float (&y)[kFragments][kTiles][4],
                                const float (&q)[kFragments][kRewardTiles][4]) const {
    bool any = false;
    OFFTOWER_UNROLL
    for (int r = 0; r < kHeld; ++r) any |= own[r] >= first && own[r] < first + kColumns;
    if (ballot(any) == 0) return; // as good as always
    const int column = lane_index() % 4 * 2;
    OFFTOWER_UNROLL
    for (int r = 0; r < kHeld; ++r) {
      const int64_t at = own[r] - first - column; // 8 n + c, where it is this thread's
      float score = 0.0f, value = 0.0f;
      bool mine = false;
      OFFTOWER_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        OFFTOWER_UNROLL
        for (int c = 0; c < 2; ++c) {
          const bool here = at == n * 8 + c;
          mine |= here;
          score = here ? y[r / 2][n][r % 2 * 2 + c] : score;
          if constexpr (kReward != Reward::none) value = here ? q[r / 2][n][r % 2 * 2 + c] : value;
        }
      }
      if (!mine) continue;
      p.own_score[row_of(r)] = score;
      if constexpr (kReward != Reward::none) p.own_reward[row_of(r)] = value;
    }
  }

  OFFTOWER_DEVICE void add_row(int r, const float (&y)[kFragments][kTiles][4],
                           const float (&q)[kFragments][kRewardTiles][4]) {
    const int m = r / 2, e = r % 2 * 2;
    float top = y[m][0][e];
    OFFTOWER_UNROLL
    for (int n = 0; n < kTiles; ++n) top = larger(top, larger(y[m][n][e], y[m][n][e + 1]));
    if (top > sums[r].anchor) { // rare after the first tiles
      fold(r);
      move_anchor(sums[r], top);
    }
    const float anchor = sums[r].anchor == -infinity() ? 0.0f : sums[r].anchor;
    float mass = 0.0f, worth = 0.0f, spread = 0.0f;
    OFFTOWER_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      OFFTOWER_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float below = y[m][n][e + c] - anchor;
        const float w = fast_exp2(below);
        mass += w;
        if constexpr (kReward != Reward::none) worth = fused(w, q[m][n][e + c], worth);
        if constexpr (kEntropy) spread = fused(w, larger(below, kNoMass), spread);
      }
    }
    total[r] += mass;
    if constexpr (kReward != Reward::none) reward[r] += worth;
    if constexpr (kEntropy) centred[r] += spread;
  }

  OFFTOWER_DEVICE void fold(int r) {
    sums[r].total += total[r];
    sums[r].reward += reward[r];
    sums[r].centred += centred[r];
    total[r] = reward[r] = centred[r] = 0.0f;
  }
  const ForwardProblem& p;
  const int64_t row;
  RowSums sums[kHeld];
  float total[kHeld], reward[kHeld], centred[kHeld];
  int64_t own[kHeld];
  int tiles = 0;
};

} // namespace offtower::cuda
