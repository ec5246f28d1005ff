// Kernel launches (on the device, or block by block in the emulation), and dispatch from operands to kernels.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>

#include "epilogue/online_softmax.h"
#include "plan.h"

#if !defined(__CUDACC__)
#include "emulation/block.h"
#endif

namespace offtower::cuda {

#if defined(__CUDACC__)
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kMaxThreadsPerBlock, Kernel::kMinBlocksPerMultiprocessor)
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
    throw std::runtime_error("a launch of " + std::to_string(blocks) +
                             " blocks exceeds the grid limit of 2^31 - 1");
#if defined(__CUDACC__)
  constexpr auto kernel = run_kernel<Kernel>;
  if (shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
           static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(call.stream)>>>(params);
  check(cudaGetLastError(), "kernel launch");
#else
  (void)call;
  emulation::run(blocks, threads, static_cast<std::size_t>(shared_bytes),
                 [&](char* shared) { Kernel::run(params, shared); });
#endif
}

// A thread for each of `count` elements, no shared memory.
template <class Kernel>
void launch_elementwise(const typename Kernel::Params& params, int64_t count, const Call& call) {
  launch<Kernel>(params, ceil_div(count, Kernel::kMaxThreadsPerBlock), Kernel::kMaxThreadsPerBlock,
                 0, call);
}

// Calls `use(T{})`. top_k is exact, so tf32 does not apply to it.
template <class Use>
auto dispatch_exact_dtype(DType dtype, Use use) {
  if (dtype == DType::bfloat16) return use(Bfloat16{});
  return use(0.0f);
}
template <class Use>
auto dispatch_dtype(DType dtype, Use use) {
  if (dtype == DType::tfloat32) return use(Tfloat32{});
  return dispatch_exact_dtype(dtype, use);
}

template <Reward kReward>
struct RewardTag {
  static constexpr Reward value = kReward;
};
template <class Use>
auto dispatch_reward(RewardKind kind, Use use) {
  if (kind == RewardKind::none) return use(RewardTag<Reward::none>{});
  if (kind == RewardKind::dense) return use(RewardTag<Reward::dense>{});
  return use(RewardTag<Reward::factored>{});
}

// The kernel of a pass: which side is resident, the reward, and the padded width of embeddings.
struct PassVariant {
  bool items_resident;
  Reward reward;
  int dim;
};

// Widths that the gradients are instantiated for.
inline int padded_dim(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

inline int factored_width(const PolicyOperands& o, Reward reward) {
  return reward == Reward::factored ? static_cast<int>(o.reward_dim) : 0;
}

inline PassShape forward_pass(const PolicyOperands& o, Reward reward) {
  const int64_t split_bytes = o.rows * static_cast<int64_t>(sizeof(RowSums));
  return {static_cast<int>(o.dim), factored_width(o, reward), o.rows, o.items, split_bytes};
}
inline PassShape gradient_pass(const PolicyOperands& o, const PassVariant& variant) {
  const int64_t resident = variant.items_resident ? o.items : o.rows;
  const int64_t streamed = variant.items_resident ? o.rows : o.items;
  return {variant.dim, factored_width(o, variant.reward), resident, streamed, resident * o.dim * 4};
}

// Calls `use(MaskTag<...>{})`: whether a bitmap restricts the items.
template <bool kMasked>
struct MaskTag {
  static constexpr bool value = kMasked;
};
template <class Use>
auto dispatch_mask(const PolicyOperands& o, Use use) {
  if (o.eligible.bitmap != nullptr) return use(MaskTag<true>{});
  return use(MaskTag<false>{});
}

inline EligibleParams make_eligible_params(const PolicyOperands& o) {
  return {o.eligible.group, o.eligible.bitmap, o.eligible.words};
}

inline PolicyParams make_policy_params(const PolicyOperands& o, const PassVariant& variant,
                                       int splits, int stages) {
  const Matrix context{o.context, o.rows, static_cast<int>(o.dim)};
  const Matrix item{o.item, o.items, static_cast<int>(o.dim)};
  const int reward_width = factored_width(o, variant.reward); // 0: the rewards are biases alone
  const Matrix reward_context{o.reward_context, o.rows, reward_width};
  const Matrix reward_item{o.reward_item, o.items, reward_width};
  PolicyParams p{};
  p.resident = variant.items_resident ? item : context;
  p.streamed = variant.items_resident ? context : item;
  p.reward_resident = variant.items_resident ? reward_item : reward_context;
  p.reward_streamed = variant.items_resident ? reward_context : reward_item;
  p.item_bias = o.item_bias;
  p.reward_bias = variant.reward == Reward::factored ? o.reward_bias : nullptr;
  p.dense = o.dense;
  p.items = o.items;
  p.scale = static_cast<float>(1.4426950408889634 / static_cast<double>(o.temperature));
  p.sigmoid = o.reward == RewardKind::sigmoid;
  p.splits = splits;
  p.stages = stages;
  return p;
}

} // namespace offtower::cuda
