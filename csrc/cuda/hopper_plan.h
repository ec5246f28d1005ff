// Hopper's kernels as the launchers see them: bfloat16, no dense rewards. Where they are not built or do not
// accept the operands, plan.fits is false and the portable kernels run.
#pragma once

#include "epilogue/score_gradient.h"
#include "launch.h"

namespace offtower::cuda {

HopperPlan plan_hopper_forward(const PolicyOperands& o, Reward reward, const Device& device);
HopperPlan plan_hopper_gradient(const PolicyOperands& o, const PassVariant& variant,
                                const Device& device);

void launch_hopper_forward(const ForwardParams& p, bool entropy, const HopperPlan& plan,
                           const Call& call);
void launch_hopper_gradient(const GradientParams& p, const PassVariant& variant,
                            const HopperPlan& plan, const Call& call);

} // namespace offtower::cuda
