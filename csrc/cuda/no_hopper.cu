// In place of the kernels for Hopper, where sm_90a is not built.
#include "hopper.h"

namespace offtower::cuda {

HopperPlan plan_hopper_forward(const PolicyOperands&, const Device&, int64_t) { return {}; }
HopperPlan plan_hopper_gradient(const PolicyOperands&, bool, Reward, int, const Device&, int64_t) {
  return {};
}
void launch_hopper_forward(const ForwardProblem&, bool, const HopperPlan&, const Call&) {}
void launch_hopper_gradient(const GradientProblem&, bool, Reward, int, const HopperPlan&, const Call&) {}

} // namespace offtower::cuda
