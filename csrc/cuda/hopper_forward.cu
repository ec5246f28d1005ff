// The forward pass on Hopper.
#include "hopper.h"
#include "hopper_launch.h"

namespace offtower::cuda {

HopperPlan plan_hopper_forward(const PolicyOperands& o, const Device& device, int64_t split_bytes) {
  if (!taken(o, true)) return {};
  using Kernel = HopperForward<Reward::none, false>;
  return plan_hopper(device, Kernel::kColumns, panels_of(static_cast<int>(o.dim)),
                     panels_of(factored_width(o, true)), Kernel::kVectors, o.rows, o.items, split_bytes);
}

void launch_hopper_forward(const ForwardProblem& p, bool entropy, const HopperPlan& plan,
                           const Call& call) {
  const int panels = panels_of(p.policy.stay.width);
  const auto run = [&](auto kernel) { launch_hopper<decltype(kernel)>(p, panels, plan, call); };
  if (p.policy.reward_stay.width == 0) {
    if (entropy) run(HopperForward<Reward::none, true>{});
    else run(HopperForward<Reward::none, false>{});
  } else {
    if (entropy) run(HopperForward<Reward::factored, true>{});
    else run(HopperForward<Reward::factored, false>{});
  }
}

} // namespace offtower::cuda
