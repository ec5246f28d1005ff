// Properties of a device, and which operands its kernels accept.
#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <type_traits>

#include "hopper_plan.h"
#include "kernels/forward.h"
#include "kernels/gradient.h"

#define OFFTOWER_STRING_OF(x) #x
#define OFFTOWER_STRING(x) OFFTOWER_STRING_OF(x)

namespace offtower::cuda {

#if defined(__CUDACC__)
namespace {

// As in "80_90a", from cuda_build.py.
std::string built_architectures() { return OFFTOWER_STRING(OFFTOWER_BUILT_ARCHITECTURES); }

Device query_properties(int number) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, number), "cudaDeviceGetAttribute");
    return value;
  };
  constexpr int kStaticSharedBytes = 1024; // left for shared memory that is not dynamic
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  return {number,
          major,
          attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStaticSharedBytes,
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          major == 9};
}

} // namespace

Device device_properties(int number) {
  constexpr int kMaxDevices = 64;
  static std::once_flag once[kMaxDevices];
  static Device cached[kMaxDevices];
  if (number < 0 || number >= kMaxDevices)
    throw std::runtime_error("device " + std::to_string(number) + " is not between 0 and 63");
  // The runtime is linked statically and keeps its own current device, apart from torch's.
  check(cudaSetDevice(number), "cudaSetDevice");
  std::call_once(once[number], [&] { cached[number] = query_properties(number); });
  Device device = cached[number];
  const char* kernels = std::getenv("OFFTOWER_CUDA_KERNELS");
  if (kernels != nullptr && std::string(kernels) == "portable") device.hopper_kernels = false;
  return device;
}
#else
namespace {

std::string built_architectures() {
  const char* given = std::getenv("OFFTOWER_EMULATED_ARCHITECTURES");
  return given == nullptr ? "80_90a" : given;
}

} // namespace

// OFFTOWER_EMULATED_DEVICE holds the members of Device from `major` to `total_shared`. By default there are
// three multiprocessors, so that small problems are split.
Device device_properties(int number) {
  Device d{number, 8, 0, 3, 163 << 10, 164 << 10, false};
  if (const char* given = std::getenv("OFFTOWER_EMULATED_DEVICE"))
    std::sscanf(given, "%d %d %d %d %d", &d.major, &d.minor, &d.multiprocessors, &d.block_shared,
                &d.total_shared);
  d.hopper_kernels = d.major == 9;
  return d;
}
#endif

namespace {

std::vector<std::string> split(const std::string& architectures) {
  std::istringstream stream(architectures);
  std::vector<std::string> all;
  for (std::string one; std::getline(stream, one, '_');) all.push_back(one);
  return all;
}

// CUDA Programming Guide, "Binary Compatibility" and "PTX Compatibility": code for sm_90a runs on compute
// capability 9.0 alone. Other architectures are built with PTX, which runs from theirs on.
bool runs_on(const std::vector<std::string>& architectures, const Device& device) {
  const int present = device.major * 10 + device.minor;
  return std::any_of(architectures.begin(), architectures.end(), [&](const std::string& one) {
    const bool has_ptx = std::isdigit(static_cast<unsigned char>(one.back())) != 0;
    const int built = std::atoi(one.c_str());
    return has_ptx ? present >= built : present == built;
  });
}

std::string compute_capability(const Device& device) {
  return "device " + std::to_string(device.number) + " has compute capability " +
         std::to_string(device.major) + "." + std::to_string(device.minor);
}

} // namespace

std::string refusal(const PolicyOperands& o, const Device& device) {
  if (device.major < 8)
    return "the kernels need compute capability 8.0, and " + compute_capability(device);
  const std::vector<std::string> built = split(built_architectures());
  if (!runs_on(built, device)) {
    std::string names;
    for (const std::string& one : built) names += (names.empty() ? "sm_" : ", sm_") + one;
    return "the kernels were built for " + names + ", and " + compute_capability(device) +
           "; build them with OFFTOWER_CUDA_ARCHITECTURES=" + std::to_string(device.major) +
           std::to_string(device.minor);
  }
  if (o.dim > 256 || o.reward_dim > 256)
    return "the kernels take embeddings of up to 256 dimensions, and these have " +
           std::to_string(max(o.dim, o.reward_dim));
  if (o.items > int64_t{1} << 31)
    return "the kernels take up to 2^31 items, and there are " + std::to_string(o.items);
  const Reward reward = dispatch_reward(o.reward, [](auto tag) { return decltype(tag)::value; });
  const bool fits = dispatch_dtype(o.dtype, [&](auto t) {
    using T = decltype(t);
    // dv needs the most shared memory: eight statistics of each streamed context.
    const PassShape pass{padded_dim(o.dim), factored_width(o, reward), 1, 1, 0};
    return plan_pass(device, footprint<Gradient<T, true, Reward::factored, 256, false>, T>(), pass)
        .fits;
  });
  return fits ? ""
              : "tiles of these widths do not fit the shared memory of device " +
                    std::to_string(device.number);
}

namespace {

PassPlan describe(const char* name, const HopperPlan& hopper, const Plan& plan) {
  constexpr int kHopperThreads = 384; // see mainloop/tma_pipeline.h, which needs sm_90a
  if (hopper.fits)
    return {
        name,
        true,
        true,
        kHopperThreads,
        hopper.splits,
        hopper.stages,
        hopper.shared_bytes,
        hopper.blocks,
    };
  return {name,        plan.fits,         false,      plan.warps * 32, plan.splits,
          plan.stages, plan.shared_bytes, plan.blocks};
}

} // namespace

std::vector<PassPlan> plans(const PolicyOperands& o, const Device& device) {
  return dispatch_dtype(o.dtype, [&](auto t) {
    return dispatch_reward(o.reward, [&](auto reward) {
      using T = decltype(t);
      constexpr Reward kReward = decltype(reward)::value;
      const auto gradient = [&](auto side) {
        constexpr bool kItemsResident = decltype(side)::value;
        const PassVariant variant{kItemsResident, kReward, padded_dim(o.dim)};
        return describe(
            kItemsResident ? "dv" : "du", plan_hopper_gradient(o, variant, device),
            plan_pass(device, footprint<Gradient<T, kItemsResident, kReward, 256, false>, T>(),
                      gradient_pass(o, variant)));
      };
      return std::vector<PassPlan>{
          describe("forward", plan_hopper_forward(o, kReward, device),
                   plan_pass(device, footprint<Forward<T, kReward, false, false>, T>(),
                             forward_pass(o, kReward))),
          gradient(std::false_type{}), gradient(std::true_type{})};
    });
  });
}

} // namespace offtower::cuda
