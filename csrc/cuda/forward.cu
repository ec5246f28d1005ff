// Launches the forward pass and top_k.
#include "hopper_plan.h"
#include "kernels/forward.h"
#include "kernels/forward_combine.h"
#include "kernels/top_k.h"

namespace offtower::cuda {
namespace {

template <class T, Reward kReward, bool kEntropy, bool kMasked>
int64_t run_forward(const PolicyOperands& o, const ForwardResults& results, const Call& call) {
  using Kernel = Forward<T, kReward, kEntropy, kMasked>;
  const PassShape pass = forward_pass(o, kReward);
  const HopperPlan hopper = plan_hopper_forward(o, kReward, call.device);
  const Plan plan = plan_pass(call.device, footprint<Kernel, T>(), pass);
  const int splits = hopper.fits ? hopper.splits : plan.splits;
  const int stages = hopper.fits ? hopper.stages : plan.stages;
  Workspace workspace(call.workspace);
  const ForwardParams p{make_policy_params(o, {false, kReward, pass.width}, splits, stages),
                        o.action,
                        workspace.allocate<RowSums>(splits * o.rows),
                        workspace.allocate<float>(o.rows),
                        workspace.allocate<float>(o.rows),
                        make_eligible_params(o)};
  if (call.workspace == nullptr) return workspace.bytes();
  if (hopper.fits)
    launch_hopper_forward(p, kEntropy, hopper, call);
  else
    launch<Kernel>(p, plan.blocks, plan.warps * 32, plan.shared_bytes, call);
  launch_elementwise<ForwardCombine>({p.sums, p.target_score, p.target_reward, o.action, o.rows,
                                      o.items, splits, kReward != Reward::none, results},
                                     o.rows * 32, call);
  return workspace.bytes();
}

} // namespace

int64_t forward(const PolicyOperands& o, const ForwardResults& results, const Call& call) {
  const bool entropy = results.entropy != nullptr || results.centered_sum != nullptr;
  return dispatch_dtype(o.dtype, [&](auto t) {
    return dispatch_reward(o.reward, [&](auto reward) {
      using T = decltype(t);
      constexpr Reward kReward = decltype(reward)::value;
      return dispatch_mask(o, [&](auto mask) {
        constexpr bool kMasked = decltype(mask)::value;
        return entropy ? run_forward<T, kReward, true, kMasked>(o, results, call)
                       : run_forward<T, kReward, false, kMasked>(o, results, call);
      });
    });
  });
}

namespace {

template <class T, bool kMasked>
int64_t run_top_k(const PolicyOperands& o, const TopKResults& results, const Call& call) {
  using Kernel = TopK<T, kMasked>;
  using Combine = TopKCombine<kMasked>;
  const int64_t capacity = list_capacity(results.k);
  const PassShape pass{static_cast<int>(o.dim), 0, o.rows, o.items, o.rows * capacity * 8};
  const Plan plan = plan_pass(call.device, footprint<Kernel, T>(), pass);
  Workspace workspace(call.workspace);
  const TopKParams p{
      make_policy_params(o, {false, Reward::none, pass.width}, plan.splits, plan.stages),
      1.0f / o.temperature,
      results.k,
      capacity,
      workspace.allocate<uint64_t>(plan.splits * o.rows * capacity),
      make_eligible_params(o)};
  if (call.workspace == nullptr) return workspace.bytes();
  launch<Kernel>(p, plan.blocks, plan.warps * 32, plan.shared_bytes, call);
  const TopKCombineParams combine{p.lists,     o.rows,        results.k,    capacity,
                                  plan.splits, results.score, results.index};
  constexpr int kWarps = Combine::kMaxThreadsPerBlock / 32;
  launch<Combine>(combine, ceil_div(o.rows, kWarps), Combine::kMaxThreadsPerBlock, 0, call);
  return workspace.bytes();
}

} // namespace

int64_t top_k(const PolicyOperands& o, const TopKResults& results, const Call& call) {
  return dispatch_exact_dtype(o.dtype, [&](auto t) {
    return dispatch_mask(o, [&](auto mask) {
      return run_top_k<decltype(t), decltype(mask)::value>(o, results, call);
    });
  });
}

} // namespace offtower::cuda
