// Launches the gradient of one side. Each side is a translation unit, since these compile longest.
#pragma once

#include "hopper_plan.h"
#include "kernels/backward_statistics.h"
#include "kernels/gradient.h"

namespace offtower::cuda {

// Append their arrays to `workspace`, and launch if it has memory.
void context_gradient(const BackwardOperands& in, const BackwardResults& results,
                      const BackwardPreprocessParams& prepared, Workspace& workspace,
                      const Call& call);
void item_gradient(const BackwardOperands& in, const BackwardResults& results,
                   const BackwardPreprocessParams& prepared, Workspace& workspace,
                   const Call& call);

template <class T, bool kItemsResident, Reward kReward, int kDim, bool kMasked>
void run_gradient(const BackwardOperands& in, const BackwardResults& results,
                  const BackwardPreprocessParams& prepared, Workspace& workspace,
                  const Call& call) {
  using Kernel = Gradient<T, kItemsResident, kReward, kDim, kMasked>;
  const PolicyOperands& o = in.policy;
  const PassVariant variant{kItemsResident, kReward, kDim};
  const int64_t rows = kItemsResident ? o.items : o.rows;
  void* const out = kItemsResident ? results.item : results.context;
  const HopperPlan hopper = plan_hopper_gradient(o, variant, call.device);
  const Plan plan = plan_pass(call.device, footprint<Kernel, T>(), gradient_pass(o, variant));
  const int splits = hopper.fits ? hopper.splits : plan.splits;
  GradientParams p{};
  p.policy = make_policy_params(o, variant, splits, hopper.fits ? hopper.stages : plan.stages);
  p.eligible = make_eligible_params(o);
  p.stats = prepared.stats;
  p.padded_contexts = prepared.padded_contexts;
  p.has_entropy = in.cotangents.entropy != nullptr;
  p.has_log_prob = in.cotangents.log_prob != nullptr && o.action != nullptr;
  p.output_scale = 1.0f / o.temperature;
  // dv is complete after one split; du still lacks its targets' items.
  const bool direct = kItemsResident && splits == 1;
  p.gradient = direct ? out : nullptr;
  if (!direct && out != nullptr) p.partial = workspace.allocate<float>(splits * rows * o.dim);
  const bool bias = kItemsResident && results.item_bias != nullptr;
  if (bias) p.bias_partial = workspace.allocate<float>(splits * o.items);
  if (call.workspace == nullptr) return;
  if (hopper.fits)
    launch_hopper_gradient(p, variant, hopper, call);
  else
    launch<Kernel>(p, plan.blocks, plan.warps * 32, plan.shared_bytes, call);
  if (p.partial != nullptr) {
    GradientReduceParams reduce{p.partial, splits,  rows, static_cast<int>(o.dim), nullptr,
                                nullptr,   nullptr, 0,    p.output_scale,          out};
    if (!kItemsResident && p.has_log_prob) {
      reduce.g_log_prob = in.cotangents.log_prob;
      reduce.action = o.action;
      reduce.item = o.item;
      reduce.items = o.items;
    }
    launch_elementwise<GradientReduce<T>>(reduce, rows * o.dim, call);
  }
  if (bias)
    launch_elementwise<GradientReduce<T>>(
        {p.bias_partial, splits, o.items, 1, nullptr, nullptr, nullptr, 0, 1.0f, results.item_bias},
        o.items, call);
}

template <bool kItemsResident>
void run_gradient(const BackwardOperands& in, const BackwardResults& results,
                  const BackwardPreprocessParams& prepared, Workspace& workspace,
                  const Call& call) {
  const RewardKind kind =
      in.cotangents.expected_reward == nullptr ? RewardKind::none : in.policy.reward;
  dispatch_dtype(in.policy.dtype, [&](auto t) {
    dispatch_reward(kind, [&](auto reward) {
      using T = decltype(t);
      constexpr Reward kReward = decltype(reward)::value;
      dispatch_mask(in.policy, [&](auto mask) {
        constexpr bool kMasked = decltype(mask)::value;
        const int dim = padded_dim(in.policy.dim);
        if (dim == 64)
          run_gradient<T, kItemsResident, kReward, 64, kMasked>(in, results, prepared, workspace,
                                                                call);
        else if (dim == 128)
          run_gradient<T, kItemsResident, kReward, 128, kMasked>(in, results, prepared, workspace,
                                                                 call);
        else
          run_gradient<T, kItemsResident, kReward, 256, kMasked>(in, results, prepared, workspace,
                                                                 call);
      });
    });
  });
}

} // namespace offtower::cuda
