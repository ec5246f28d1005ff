// The small kernels around the large ones: a thread a context, an item or a number.
#pragma once

#include "forward_rows.h"
#include "gradient_rows.h"
#include "../../operands.h"

namespace offtower::cuda {

constexpr int kSmallThreads = 128;

// Terms of each context from the sums of its splits, in the order of the splits.
struct FinishProblem {
  const RowSums* sums;
  const float* own_score;
  const float* own_reward;
  const int64_t* action;
  int64_t contexts, items;
  int splits;
  bool reward;
  ForwardResults results;
};

struct Finish {
  using Params = FinishProblem;
  static constexpr int kMostThreads = kSmallThreads, kBlocks = 1;

  static OFFTOWER_DEVICE void run(const Params& p, char*) {
    const int64_t i = block_index() * thread_count() + thread_index();
    if (i >= p.contexts) return;
    RowSums s = p.sums[i];
    for (int k = 1; k < p.splits; ++k) merge(s, p.sums[k * p.contexts + i]);
    // The anchor leaves in nats. For the backward pass the sums are relative to what that makes of it,
    // so that exp(s - anchor) / total is what it was; partial sums to the anchor itself, to be merged.
    const ForwardResults& r = p.results;
    const bool partial = r.action_logit != nullptr;
    const bool masked = s.total == 0.0;
    const float anchor = masked ? 0.0f : s.anchor * kLn2;
    const double returned = partial ? anchor / kLn2d : static_cast<double>(anchor * kLog2E);
    const double own_anchor = masked ? 0.0 : s.anchor;
    if (!masked && s.anchor - s.anchor == 0.0f) {
      const double shift = own_anchor - returned, factor = exp2_of(shift);
      s.centred = factor * (s.centred + s.total * shift);
      s.total *= factor;
      s.reward *= factor;
    }
    const double log_total = log_of(s.total);
    const auto put = [&](float* array, double value) {
      if (array != nullptr) array[i] = static_cast<float>(value);
    };
    const int64_t action = p.action == nullptr ? -1 : p.action[i];
    if (action >= 0) {
      // Beyond the items: nobody looked (that would wait for the device), so it must show.
      const bool there = action < p.items;
      const double score = there ? p.own_score[i] : float_of_bits(0x7fc00000u);
      put(r.log_prob, (score - returned) * kLn2d - log_total);
      put(r.action_logit, score * kLn2d);
      put(r.action_reward, !p.reward ? 0.0 : there ? p.own_reward[i] : score);
    } else {
      put(r.log_prob, -infinity());
      put(r.action_logit, -infinity());
      put(r.action_reward, 0.0);
    }
    put(r.log_normalizer, masked ? -infinity() : returned * kLn2d + log_total);
    put(r.expected_reward, s.reward / s.total);
    put(r.entropy, log_total - s.centred / s.total * kLn2d);
    put(r.anchor, masked ? -infinity() : anchor);
    put(r.total, s.total);
    put(r.reward_sum, s.reward);
    put(r.centred_sum, s.centred * kLn2d);
  }

private:
  static constexpr double kLn2d = 0.69314718055994530942;
};

// What the gradient needs of each context; padding has an infinite anchor and so no mass.
struct PrepareProblem {
  BackwardOperands in;
  float* stats;
  int64_t padded_contexts;
};

struct Prepare {
  using Params = PrepareProblem;
  static constexpr int kMostThreads = kSmallThreads, kBlocks = 1;

  static OFFTOWER_DEVICE void run(const Params& p, char*) {
    const int64_t i = block_index() * thread_count() + thread_index();
    if (i >= p.padded_contexts) return;
    const auto put = [&](RowStat which, float value) { p.stats[which * p.padded_contexts + i] = value; };
    if (i >= p.in.policy.rows) {
      for (int which = 0; which < kRowStats; ++which) put(static_cast<RowStat>(which), 0.0f);
      put(kAnchorStat, infinity());
      put(kActionStat, float_of_bits(0xffffffffu));
      return;
    }
    const Cotangents& g = p.in.cotangents;
    const double total = p.in.total[i];
    double base = 0.0;
    if (g.log_prob != nullptr) base -= g.log_prob[i];
    if (g.log_normalizer != nullptr) base += g.log_normalizer[i];
    if (g.entropy != nullptr) base -= static_cast<double>(g.entropy[i]) * p.in.entropy[i];
    const float anchor = p.in.anchor[i];
    put(kAnchorStat, anchor == -infinity() ? 0.0f : anchor * kLog2E);
    put(kBaseStat, static_cast<float>(base / total));
    put(kRewardStat, g.expected_reward == nullptr ? 0.0f : static_cast<float>(g.expected_reward[i] / total));
    put(kExpectedStat, g.expected_reward == nullptr ? 0.0f : p.in.expected_reward[i]);
    put(kEntropyStat, g.entropy == nullptr ? 0.0f : static_cast<float>(g.entropy[i] / total));
    put(kLogTotalStat, static_cast<float>(log_of(total)));
    put(kOwnStat, g.log_prob == nullptr ? 0.0f : g.log_prob[i]);
    const int64_t action = p.in.policy.action == nullptr ? -1 : p.in.policy.action[i];
    const bool there = action >= 0 && action < p.in.policy.items;
    put(kActionStat, float_of_bits(there ? static_cast<uint32_t>(action) : 0xffffffffu));
  }
};

// A gradient from the partial sums of its splits, in their order; for contexts with their own items.
struct SumProblem {
  const float* partial; // (splits, rows, width)
  int splits;
  int64_t rows;
  int width;
  const float* own;      // (rows,) cotangents of log_prob, or null
  const int64_t* action; // of `own`
  const void* item;      // (items, width) of T
  int64_t items;
  float scale;
  void* out; // (rows, width) of T
};

template <class T>
struct Sum {
  using Params = SumProblem;
  static constexpr int kMostThreads = kSmallThreads, kBlocks = 1;

  static OFFTOWER_DEVICE void run(const Params& p, char*) {
    const int64_t i = block_index() * thread_count() + thread_index(), count = p.rows * p.width;
    if (i >= count) return;
    float sum = p.partial[i];
    for (int k = 1; k < p.splits; ++k) sum += p.partial[k * count + i];
    if (p.own != nullptr) {
      const int64_t row = i / p.width, action = p.action[row];
      if (action >= 0 && action < p.items)
        sum = fused(p.own[row], to_float(static_cast<const T*>(p.item)[action * p.width + i % p.width]), sum);
    }
    static_cast<T*>(p.out)[i] = from_float<T>(sum * p.scale);
  }
};

} // namespace offtower::cuda
