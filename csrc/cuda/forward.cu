// Launches the forward pass and top_k of the portable kernels.
#include "hopper.h"
#include "kernels/finish.h"
#include "kernels/forward.h"
#include "kernels/top_k.h"
#include "launch.h"

namespace offtower::cuda {
namespace {

template <class T, Reward kReward, bool kEntropy>
int64_t run_forward(const PolicyOperands& o, const ForwardResults& results, const Call& call) {
  using Kernel = Forward<T, kReward, kEntropy>;
  const int64_t split_bytes = o.rows * static_cast<int64_t>(sizeof(RowSums));
  const HopperPlan hopper = plan_hopper_forward(o, call.device, split_bytes);
  const Plan plan = plan_pass(call.device, footprint<Kernel, T>(), static_cast<int>(o.dim),
                              factored_width(o, true), o.rows, o.items, split_bytes);
  const int splits = hopper.fits ? hopper.splits : plan.splits;
  Workspace workspace(call.workspace);
  ForwardProblem p{problem_of(o, false, true, splits, plan.stages), o.action,
                   workspace.take<RowSums>(splits * o.rows), workspace.take<float>(o.rows),
                   workspace.take<float>(o.rows)};
  if (call.workspace == nullptr) return workspace.bytes();
  if (hopper.fits) launch_hopper_forward(p, kEntropy, hopper, call);
  else launch<Kernel>(p, plan.blocks, plan.warps * 32, plan.shared_bytes, call);
  launch_small<Finish>({p.sums, p.own_score, p.own_reward, o.action, o.rows, o.items, splits,
                        kReward != Reward::none, results},
                       o.rows, call);
  return workspace.bytes();
}

} // namespace

int64_t forward(const PolicyOperands& o, const ForwardResults& results, const Call& call) {
  const bool entropy = results.entropy != nullptr || results.centred_sum != nullptr;
  return with_type(o.dtype, [&](auto t) {
    return with_reward(o.reward, [&](auto reward) {
      using T = decltype(t);
      constexpr Reward kReward = decltype(reward)::value;
      return entropy ? run_forward<T, kReward, true>(o, results, call)
                     : run_forward<T, kReward, false>(o, results, call);
    });
  });
}

int64_t top_k(const PolicyOperands& o, const TopKResults& results, const Call& call) {
  return with_exact_type(o.dtype, [&](auto t) {
    using T = decltype(t);
    using Kernel = TopK<T>;
    const int64_t capacity = list_capacity(results.k);
    const Plan plan = plan_pass(call.device, footprint<Kernel, T>(), static_cast<int>(o.dim), 0,
                                o.rows, o.items, o.rows * capacity * 8);
    Workspace workspace(call.workspace);
    const TopKProblem p{problem_of(o, false, false, plan.splits, plan.stages), 1.0f / o.temperature, results.k, capacity,
                        workspace.take<uint64_t>(plan.splits * o.rows * capacity)};
    if (call.workspace == nullptr) return workspace.bytes();
    launch<Kernel>(p, plan.blocks, plan.warps * 32, plan.shared_bytes, call);
    const MergeTopKProblem merge{p.lists,     o.rows,        results.k,    capacity,
                                 plan.splits, results.score, results.index};
    constexpr int kWarps = MergeTopK::kMostThreads / 32;
    launch<MergeTopK>(merge, ceil_div(o.rows, kWarps), MergeTopK::kMostThreads, 0, call);
    return workspace.bytes();
  });
}

} // namespace offtower::cuda
