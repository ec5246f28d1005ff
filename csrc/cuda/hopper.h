// Hopper's kernels as the launchers of the operators see them: bfloat16, without dense rewards. Where
// they were not built, or do not take the operands, a plan does not fit and the portable kernels run.
#pragma once

#include "kernels/forward_rows.h"
#include "kernels/gradient_rows.h"
#include "plan.h"

namespace offtower::cuda {

HopperPlan plan_hopper_forward(const PolicyOperands& o, const Device& device, int64_t split_bytes);
HopperPlan plan_hopper_gradient(const PolicyOperands& o, bool items_stay, Reward reward, int width,
                                const Device& device, int64_t split_bytes);

void launch_hopper_forward(const ForwardProblem& p, bool entropy, const HopperPlan& plan,
                           const Call& call);
void launch_hopper_gradient(const GradientProblem& p, bool items_stay, Reward reward, int width,
                            const HopperPlan& plan, const Call& call);

} // namespace offtower::cuda
