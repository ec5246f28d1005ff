// Combines the sums of all splits into the terms of each context, by one warp each: few contexts have
// hundreds of splits. The order depends on the number of splits alone.
#pragma once

#include "../../operands.h"
#include "../epilogue/online_softmax.h"

namespace offtower::cuda {

constexpr int kElementwiseThreads = 128;

struct ForwardCombineParams {
  const RowSums* sums;
  const float* target_score;
  const float* target_reward;
  const int64_t* action;
  int64_t contexts, items;
  int splits;
  bool reward;
  ForwardResults results;
};

struct ForwardCombine {
  using Params = ForwardCombineParams;
  static constexpr int kMaxThreadsPerBlock = kElementwiseThreads, kMinBlocksPerMultiprocessor = 1;

  static OFFTOWER_DEVICE void run(const Params& p, char*) {
    const int64_t i = (block_idx() * block_dim() + thread_idx()) / 32;
    if (i >= p.contexts) return;
    RowSums s{0.0, 0.0, 0.0, -infinity(), 0};
    for (int k = lane_idx(); k < p.splits; k += 32) merge(s, p.sums[k * p.contexts + i]);
    merge_lanes(s, 32);
    if (lane_idx() != 0) return;
    // The maximum is returned in float32 nats, and the sums are made relative to that rounded value, in
    // units of log 2 as its reader computes it: the backward pass multiplies by log2(e) in float32,
    // merges of partial sums in float64.
    const ForwardResults& r = p.results;
    const bool partial = r.action_logit != nullptr;
    const bool masked = s.total == 0.0;
    const float reference_max = masked ? 0.0f : s.reference_max * kLn2;
    const double returned_max =
        partial ? reference_max / kLn2d : static_cast<double>(reference_max * kLog2E);
    const double exact_max = masked ? 0.0 : s.reference_max;
    if (!masked && s.reference_max - s.reference_max == 0.0f) { // finite
      const double shift = exact_max - returned_max, factor = exp2(shift);
      s.centered = factor * (s.centered + s.total * shift);
      s.total *= factor;
      s.reward *= factor;
    }
    const double log_total = log(s.total);
    const auto put = [&](float* array, double value) {
      if (array != nullptr) array[i] = static_cast<float>(value);
    };
    const int64_t action = p.action == nullptr ? -1 : p.action[i];
    if (action >= 0) {
      // Actions are not validated on the host, which would have to wait for the device: NaN marks them.
      const bool valid = action < p.items;
      const double score = valid ? p.target_score[i] : quiet_nan();
      put(r.log_prob, (score - returned_max) * kLn2d - log_total);
      put(r.action_logit, score * kLn2d);
      put(r.action_reward, !p.reward ? 0.0 : valid ? p.target_reward[i] : score);
    } else {
      put(r.log_prob, -infinity());
      put(r.action_logit, -infinity());
      put(r.action_reward, 0.0);
    }
    put(r.log_normalizer, masked ? -infinity() : returned_max * kLn2d + log_total);
    put(r.expected_reward, s.reward / s.total);
    put(r.entropy, log_total - s.centered / s.total * kLn2d);
    put(r.reference_max, masked ? -infinity() : reference_max);
    put(r.total, s.total);
    put(r.reward_sum, s.reward);
    put(r.centered_sum, s.centered * kLn2d);
  }

private:
  static constexpr double kLn2d = 0.69314718055994530942;
};

} // namespace offtower::cuda
