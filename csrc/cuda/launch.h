// Starts a kernel: on the device, or block by block on the emulation.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>

#include "plan.h"

#if !defined(__CUDACC__)
#include "emulation/block.h"
#endif

namespace offtower::cuda {

#if defined(__CUDACC__)
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kMostThreads, Kernel::kBlocks)
    run_kernel(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(1024) char shared[];
  Kernel::run(params, shared);
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
#endif

template <class Kernel>
void launch(const typename Kernel::Params& params, int64_t blocks, int threads, int shared_bytes,
            const Call& call) {
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int>::max())
    throw std::runtime_error("a launch of " + std::to_string(blocks) + " blocks: a grid has up to 2^31 - 1");
#if defined(__CUDACC__)
  constexpr auto kernel = run_kernel<Kernel>;
  if (shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "shared memory");
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
           static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(call.stream)>>>(params);
  check(cudaGetLastError(), "launch");
#else
  (void)call;
  emulation::run(blocks, threads, static_cast<std::size_t>(shared_bytes),
                 [&](char* shared) { Kernel::run(params, shared); });
#endif
}

// One thread each for `count` numbers, by kernels without shared memory.
template <class Kernel>
void launch_small(const typename Kernel::Params& params, int64_t count, const Call& call) {
  launch<Kernel>(params, ceil_div(count, Kernel::kMostThreads), Kernel::kMostThreads, 0, call);
}

// Calls `use(T{})` for the operands' type; a search takes no rounded products.
template <class Use>
auto with_exact_type(DType dtype, Use use) {
  if (dtype == DType::bfloat16) return use(Bfloat16{});
  return use(0.0f);
}
template <class Use>
auto with_type(DType dtype, Use use) {
  if (dtype == DType::tfloat32) return use(Tfloat32{});
  return with_exact_type(dtype, use);
}

template <Reward kReward>
struct RewardTag {
  static constexpr Reward value = kReward;
};
template <class Use>
auto with_reward(RewardKind kind, Use use) {
  if (kind == RewardKind::none) return use(RewardTag<Reward::none>{});
  if (kind == RewardKind::dense) return use(RewardTag<Reward::dense>{});
  return use(RewardTag<Reward::factored>{});
}

inline bool is_factored(RewardKind kind) {
  return kind == RewardKind::identity || kind == RewardKind::sigmoid;
}
inline int factored_width(const PolicyOperands& o, bool reward) {
  return reward && is_factored(o.reward) ? static_cast<int>(o.reward_dim) : 0;
}

// Operands as kernels see them: contexts stay, or items do.
inline Problem problem_of(const PolicyOperands& o, bool items_stay, bool reward, int splits,
                          int stages) {
  const Matrix context{o.context, o.rows, static_cast<int>(o.dim)};
  const Matrix item{o.item, o.items, static_cast<int>(o.dim)};
  const bool factored = reward && is_factored(o.reward); // of no width: the biases alone
  const int width = factored_width(o, reward);
  const Matrix reward_context{o.reward_context, o.rows, width};
  const Matrix reward_item{o.reward_item, o.items, width};
  Problem p{};
  p.stay = items_stay ? item : context;
  p.stream = items_stay ? context : item;
  p.reward_stay = items_stay ? reward_item : reward_context;
  p.reward_stream = items_stay ? reward_context : reward_item;
  p.item_bias = o.item_bias;
  p.reward_bias = factored ? o.reward_bias : nullptr;
  p.dense = o.dense;
  p.items = o.items;
  p.scale = static_cast<float>(1.4426950408889634 / static_cast<double>(o.temperature));
  p.sigmoid = o.reward == RewardKind::sigmoid;
  p.splits = splits;
  p.stages = stages;
  return p;
}

} // namespace offtower::cuda
