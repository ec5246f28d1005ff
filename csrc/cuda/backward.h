// The launch of one side's gradient; a translation unit each, since they are what takes long to compile.
#pragma once

#include "hopper.h"
#include "kernels/finish.h"
#include "kernels/gradient.h"
#include "launch.h"

namespace offtower::cuda {

// Appends to `workspace`, and launches where it is there.
void context_gradient(const BackwardOperands& in, const BackwardResults& results,
                      const PrepareProblem& prepared, Workspace& workspace, const Call& call);
void item_gradient(const BackwardOperands& in, const BackwardResults& results,
                   const PrepareProblem& prepared, Workspace& workspace, const Call& call);

template <class T, bool kItemsStay, Reward kReward, int kWidth>
void run_gradient(const BackwardOperands& in, const BackwardResults& results,
                  const PrepareProblem& prepared, Workspace& workspace, const Call& call) {
  using Kernel = Gradient<T, kItemsStay, kReward, kWidth>;
  const PolicyOperands& o = in.policy;
  const bool reward = kReward != Reward::none;
  const int64_t rows = kItemsStay ? o.items : o.rows, columns = kItemsStay ? o.rows : o.items;
  void* const out = kItemsStay ? results.item : results.context;
  const int64_t split_bytes = rows * o.dim * 4;
  const HopperPlan hopper =
      plan_hopper_gradient(o, kItemsStay, kReward, kWidth, call.device, split_bytes);
  const Plan plan = plan_pass(call.device, footprint<Kernel, T>(), kWidth, factored_width(o, reward),
                              rows, columns, split_bytes);
  const int splits = hopper.fits ? hopper.splits : plan.splits;
  GradientProblem p{};
  p.policy = problem_of(o, kItemsStay, reward, splits, plan.stages);
  p.stats = prepared.stats;
  p.padded_contexts = prepared.padded_contexts;
  p.entropy = in.cotangents.entropy != nullptr;
  p.own = in.cotangents.log_prob != nullptr && o.action != nullptr;
  p.output_scale = 1.0f / o.temperature;
  // Items write theirs at once where one block has all contexts; contexts still lack their own item.
  const bool direct = kItemsStay && splits == 1;
  p.gradient = direct ? out : nullptr;
  if (!direct && out != nullptr) p.partial = workspace.take<float>(splits * rows * o.dim);
  const bool bias = kItemsStay && results.item_bias != nullptr;
  if (bias) p.bias_partial = workspace.take<float>(splits * o.items);
  if (call.workspace == nullptr) return;
  if (hopper.fits) launch_hopper_gradient(p, kItemsStay, kReward, kWidth, hopper, call);
  else launch<Kernel>(p, plan.blocks, plan.warps * 32, plan.shared_bytes, call);
  if (p.partial != nullptr) {
    SumProblem sum{p.partial, splits, rows, static_cast<int>(o.dim), nullptr, nullptr, nullptr,
                   0, p.output_scale, out};
    if (!kItemsStay && p.own) {
      sum.own = in.cotangents.log_prob;
      sum.action = o.action;
      sum.item = o.item;
      sum.items = o.items;
    }
    launch_small<Sum<T>>(sum, rows * o.dim, call);
  }
  if (bias)
    launch_small<Sum<T>>({p.bias_partial, splits, o.items, 1, nullptr, nullptr, nullptr, 0, 1.0f,
                          results.item_bias},
                         o.items, call);
}

template <bool kItemsStay>
void run_gradient(const BackwardOperands& in, const BackwardResults& results,
                  const PrepareProblem& prepared, Workspace& workspace, const Call& call) {
  const RewardKind kind =
      in.cotangents.expected_reward == nullptr ? RewardKind::none : in.policy.reward;
  with_type(in.policy.dtype, [&](auto t) {
    with_reward(kind, [&](auto reward) {
      using T = decltype(t);
      constexpr Reward kReward = decltype(reward)::value;
      const int64_t dim = in.policy.dim;
      if (dim <= 64) run_gradient<T, kItemsStay, kReward, 64>(in, results, prepared, workspace, call);
      else if (dim <= 128) run_gradient<T, kItemsStay, kReward, 128>(in, results, prepared, workspace, call);
      else run_gradient<T, kItemsStay, kReward, 256>(in, results, prepared, workspace, call);
    });
  });
}

} // namespace offtower::cuda
