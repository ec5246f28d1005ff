// What a device is, and which operands the kernels take on it.
#include "hopper.h"
#include "kernels/forward.h"
#include "kernels/gradient.h"
#include "launch.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <type_traits>

namespace offtower::cuda {

#if defined(__CUDACC__)
Device device_facts(int number) {
  constexpr int kMost = 64;
  static std::once_flag once[kMost];
  static Device known[kMost];
  if (number < 0 || number >= kMost) throw std::runtime_error("no such device");
  // The runtime that is linked in here has a notion of its own of the current device.
  check(cudaSetDevice(number), "cudaSetDevice");
  std::call_once(once[number], [&] {
    const auto fact = [&](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, number), "cudaDeviceGetAttribute");
      return value;
    };
    // 1 KiB less, for what a block may have beside its dynamic shared memory.
    known[number] = {number,
                     fact(cudaDevAttrComputeCapabilityMajor),
                     fact(cudaDevAttrComputeCapabilityMinor),
                     fact(cudaDevAttrMultiProcessorCount),
                     fact(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024,
                     fact(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  });
  Device device = known[number];
  // The portable kernels can be had on Hopper too, to compare them.
  const char* wish = std::getenv("OFFTOWER_CUDA_KERNELS");
  if (wish != nullptr && std::string(wish) == "portable" && device.major == 9) device.major = 8;
  return device;
}
#else
// With few multiprocessors, so that small problems are split. OFFTOWER_EMULATED_DEVICE: "major minor
// multiprocessors bytes-of-a-block bytes-in-all".
Device device_facts(int number) {
  Device d{number, 8, 0, 3, 163 << 10, 164 << 10};
  if (const char* given = std::getenv("OFFTOWER_EMULATED_DEVICE"))
    std::sscanf(given, "%d %d %d %d %d", &d.major, &d.minor, &d.multiprocessors, &d.block_shared,
                &d.total_shared);
  return d;
}
#endif

std::string refusal(const PolicyOperands& o, const Device& device) {
  if (device.major < 8)
    return "the kernels need compute capability 8.0, and device " + std::to_string(device.number) +
           " has " + std::to_string(device.major) + "." + std::to_string(device.minor);
  if (o.dim > 256 || o.reward_dim > 256)
    return "the kernels take embeddings of up to 256 numbers, and these have " +
           std::to_string(largest(o.dim, o.reward_dim));
  if (o.items > int64_t{1} << 31)
    return "the kernels take up to 2^31 items, and there are " + std::to_string(o.items);
  const bool fits = with_type(o.dtype, [&](auto t) {
    using T = decltype(t);
    const int width = o.dim <= 64 ? 64 : o.dim <= 128 ? 128 : 256;
    // dv, whose tiles carry the most.
    return plan_pass(device, footprint<Gradient<T, true, Reward::factored, 256>, T>(), width,
                     factored_width(o, true), 1, 1, 0)
        .fits;
  });
  return fits ? "" : "tiles of these widths do not fit the shared memory of device " +
                         std::to_string(device.number);
}

namespace {

PassPlan described(const char* name, const HopperPlan& hopper, const Plan& plan) {
  if (hopper.fits)
    return {name, true, true, 384, hopper.splits, hopper.stages, hopper.shared_bytes, hopper.blocks};
  return {name,        plan.fits,   false, plan.warps * 32, plan.splits, plan.stages,
          plan.shared_bytes, plan.blocks};
}

} // namespace

std::vector<PassPlan> plans(const PolicyOperands& o, const Device& device) {
  const int width = o.dim <= 64 ? 64 : o.dim <= 128 ? 128 : 256;
  return with_type(o.dtype, [&](auto t) {
    return with_reward(o.reward, [&](auto reward) {
      using T = decltype(t);
      constexpr Reward kReward = decltype(reward)::value;
      const int factored = factored_width(o, true);
      const int64_t sums = o.rows * static_cast<int64_t>(sizeof(RowSums));
      const auto gradient = [&](auto side) {
        constexpr bool kItemsStay = decltype(side)::value;
        const int64_t rows = kItemsStay ? o.items : o.rows, stream = kItemsStay ? o.rows : o.items;
        return described(
            kItemsStay ? "dv" : "du",
            plan_hopper_gradient(o, kItemsStay, kReward, width, device, rows * o.dim * 4),
            plan_pass(device, footprint<Gradient<T, kItemsStay, kReward, 256>, T>(), width, factored,
                      rows, stream, rows * o.dim * 4));
      };
      return std::vector<PassPlan>{
          described("forward", plan_hopper_forward(o, device, sums),
                    plan_pass(device, footprint<Forward<T, kReward, false>, T>(),
                              static_cast<int>(o.dim), factored, o.rows, o.items, sums)),
          gradient(std::false_type{}), gradient(std::true_type{})};
    });
  });
}

} // namespace offtower::cuda
