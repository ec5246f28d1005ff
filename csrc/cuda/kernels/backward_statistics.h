// Elementwise kernels around the gradients: statistics of each context before them, and the reduction of
// partial sums after them.
#pragma once

#include "../../operands.h"
#include "../epilogue/score_gradient.h"
#include "forward_combine.h"

namespace offtower::cuda {

struct BackwardPreprocessParams {
  BackwardOperands in;
  float* stats; // [kRowStats][padded_contexts]
  int64_t padded_contexts;
};

struct BackwardPreprocess {
  using Params = BackwardPreprocessParams;
  static constexpr int kMaxThreadsPerBlock = kElementwiseThreads, kMinBlocksPerMultiprocessor = 1;

  static OFFTOWER_DEVICE void run(const Params& p, char*) {
    const int64_t i = block_idx() * block_dim() + thread_idx();
    if (i >= p.padded_contexts) return;
    const auto put = [&](RowStat which, float value) {
      p.stats[which * p.padded_contexts + i] = value;
    };
    if (i >= p.in.policy.rows) { // padding: reference_max = inf makes p = 0
      for (int which = 0; which < kRowStats; ++which) put(static_cast<RowStat>(which), 0.0f);
      put(kReferenceMaxStat, infinity());
      put(kActionStat, uint_as_float(0xffffffffu));
      return;
    }
    const Cotangents& g = p.in.cotangents;
    const double total = p.in.total[i];
    double base = 0.0;
    if (g.log_prob != nullptr) base -= g.log_prob[i];
    if (g.log_normalizer != nullptr) base += g.log_normalizer[i];
    if (g.entropy != nullptr) base -= static_cast<double>(g.entropy[i]) * p.in.entropy[i];
    const float reference_max = p.in.reference_max[i];
    put(kReferenceMaxStat, reference_max == -infinity() ? 0.0f : reference_max * kLog2E);
    put(kBaseStat, static_cast<float>(base / total));
    put(kRewardStat,
        g.expected_reward == nullptr ? 0.0f : static_cast<float>(g.expected_reward[i] / total));
    put(kExpectedStat, g.expected_reward == nullptr ? 0.0f : p.in.expected_reward[i]);
    put(kEntropyStat, g.entropy == nullptr ? 0.0f : static_cast<float>(g.entropy[i] / total));
    put(kLogTotalStat, static_cast<float>(log(total)));
    put(kTargetStat, g.log_prob == nullptr ? 0.0f : g.log_prob[i]);
    const int64_t action = p.in.policy.action == nullptr ? -1 : p.in.policy.action[i];
    const bool valid = action >= 0 && action < p.in.policy.items;
    put(kActionStat, uint_as_float(valid ? static_cast<uint32_t>(action) : 0xffffffffu));
  }
};

// Sums partial gradients over splits, in their order; adds g_log_prob_i v_{a_i} to those of contexts.
struct GradientReduceParams {
  const float* partial; // (splits, rows, width)
  int splits;
  int64_t rows;
  int width;
  const float* g_log_prob; // (rows,), or null
  const int64_t* action;   // (rows,), with g_log_prob
  const void* item;        // (items, width) of T
  int64_t items;
  float scale;
  void* out; // (rows, width) of T
};

template <class T>
struct GradientReduce {
  using Params = GradientReduceParams;
  static constexpr int kMaxThreadsPerBlock = kElementwiseThreads, kMinBlocksPerMultiprocessor = 1;

  static OFFTOWER_DEVICE void run(const Params& p, char*) {
    const int64_t i = block_idx() * block_dim() + thread_idx(), count = p.rows * p.width;
    if (i >= count) return;
    float sum = p.partial[i];
    for (int k = 1; k < p.splits; ++k) sum += p.partial[k * count + i];
    if (p.g_log_prob != nullptr) {
      const int64_t row = i / p.width, action = p.action[row];
      if (action >= 0 && action < p.items)
        sum = fma(p.g_log_prob[row],
                  to_float(static_cast<const T*>(p.item)[action * p.width + i % p.width]), sum);
    }
    static_cast<T*>(p.out)[i] = from_float<T>(sum * p.scale);
  }
};

} // namespace offtower::cuda
