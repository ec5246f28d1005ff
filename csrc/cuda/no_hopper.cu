// In place of Hopper's kernels where sm_90a is not built.
#include "hopper_plan.h"

namespace offtower::cuda {

HopperPlan plan_hopper_forward(const PolicyOperands&, Reward, const Device&) { return {}; }
HopperPlan plan_hopper_gradient(const PolicyOperands&, const PassVariant&, const Device&) {
  return {};
}
void launch_hopper_forward(const ForwardParams&, bool, const HopperPlan&, const Call&) {}
void launch_hopper_gradient(const GradientParams&, const PassVariant&, const HopperPlan&,
                            const Call&) {}

} // namespace offtower::cuda
