// Gradients on Hopper.
#include "hopper.h"
#include "hopper_launch.h"

namespace offtower::cuda {
namespace {

// Calls `use` with the kernel of these operands.
template <bool kItemsStay, Reward kReward, class Use>
void with_width(int width, Use use) {
  if (width == 64) use(HopperGradient<kItemsStay, kReward, 64>{});
  else if (width == 128) use(HopperGradient<kItemsStay, kReward, 128>{});
  else use(HopperGradient<kItemsStay, kReward, 256>{});
}
template <class Use>
void with_kernel(bool items_stay, Reward reward, int width, Use use) {
  if (reward == Reward::none) {
    if (items_stay) with_width<true, Reward::none>(width, use);
    else with_width<false, Reward::none>(width, use);
  } else {
    if (items_stay) with_width<true, Reward::factored>(width, use);
    else with_width<false, Reward::factored>(width, use);
  }
}

} // namespace

HopperPlan plan_hopper_gradient(const PolicyOperands& o, bool items_stay, Reward reward, int width,
                                const Device& device, int64_t split_bytes) {
  if (!taken(o, reward != Reward::none)) return {};
  HopperPlan plan{};
  with_kernel(items_stay, reward, width, [&](auto kernel) {
    using Kernel = decltype(kernel);
    plan = plan_hopper(device, Kernel::kColumns, width / kPanelWidth,
                       panels_of(factored_width(o, reward == Reward::factored)), Kernel::kVectors,
                       items_stay ? o.items : o.rows, items_stay ? o.rows : o.items, split_bytes);
  });
  return plan;
}

void launch_hopper_gradient(const GradientProblem& p, bool items_stay, Reward reward, int width,
                            const HopperPlan& plan, const Call& call) {
  with_kernel(items_stay, reward, width, [&](auto kernel) {
    launch_hopper<decltype(kernel)>(p, width / kPanelWidth, plan, call);
  });
}

} // namespace offtower::cuda
