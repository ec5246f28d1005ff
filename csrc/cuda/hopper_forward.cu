// Plans and launches the forward pass on Hopper.
#include "hopper_launch.h"
#include "hopper_plan.h"
#include "kernels/hopper_forward.h"

namespace offtower::cuda {

HopperPlan plan_hopper_forward(const PolicyOperands& o, Reward reward, const Device& device) {
  if (!hopper_accepts(o, reward)) return {};
  const PassShape pass = forward_pass(o, reward);
  return plan_hopper(device,
                     reward == Reward::none
                         ? hopper_tile_shape<HopperForward<Reward::none, false>>(pass)
                         : hopper_tile_shape<HopperForward<Reward::factored, false>>(pass),
                     pass);
}

void launch_hopper_forward(const ForwardParams& p, bool entropy, const HopperPlan& plan,
                           const Call& call) {
  const auto run = [&](auto kernel) {
    launch_hopper<decltype(kernel)>(p, panels_of(p.policy.resident.width), plan, call);
  };
  if (p.policy.reward_resident.width == 0) {
    if (entropy)
      run(HopperForward<Reward::none, true>{});
    else
      run(HopperForward<Reward::none, false>{});
  } else {
    if (entropy)
      run(HopperForward<Reward::factored, true>{});
    else
      run(HopperForward<Reward::factored, false>{});
  }
}

} // namespace offtower::cuda
