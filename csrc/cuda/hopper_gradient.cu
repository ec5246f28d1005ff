// Plans and launches the gradients on Hopper.
#include "hopper_launch.h"
#include "hopper_plan.h"
#include "kernels/hopper_gradient.h"

namespace offtower::cuda {
namespace {

template <bool kItemsResident, Reward kReward, class Use>
void dispatch_dim(int dim, Use use) {
  if (dim == 64)
    use(HopperGradient<kItemsResident, kReward, 64>{});
  else if (dim == 128)
    use(HopperGradient<kItemsResident, kReward, 128>{});
  else
    use(HopperGradient<kItemsResident, kReward, 256>{});
}
template <class Use>
void dispatch_kernel(const PassVariant& variant, Use use) {
  if (variant.reward == Reward::none) {
    if (variant.items_resident)
      dispatch_dim<true, Reward::none>(variant.dim, use);
    else
      dispatch_dim<false, Reward::none>(variant.dim, use);
  } else {
    if (variant.items_resident)
      dispatch_dim<true, Reward::factored>(variant.dim, use);
    else
      dispatch_dim<false, Reward::factored>(variant.dim, use);
  }
}

} // namespace

HopperPlan plan_hopper_gradient(const PolicyOperands& o, const PassVariant& variant,
                                const Device& device) {
  if (!hopper_accepts(o, variant.reward)) return {};
  const PassShape pass = gradient_pass(o, variant);
  HopperPlan plan{};
  dispatch_kernel(variant, [&](auto kernel) {
    plan = plan_hopper(device, hopper_tile_shape<decltype(kernel)>(pass), pass);
  });
  return plan;
}

void launch_hopper_gradient(const GradientParams& p, const PassVariant& variant,
                            const HopperPlan& plan, const Call& call) {
  dispatch_kernel(variant, [&](auto kernel) {
    launch_hopper<decltype(kernel)>(p, panels_of(variant.dim), plan, call);
  });
}

} // namespace offtower::cuda
