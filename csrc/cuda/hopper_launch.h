// TMA descriptors and launches of Hopper's kernels.
#pragma once

#include "launch.h"
#include "mainloop/tma_pipeline.h"

namespace offtower::cuda {

// The preconditions of cuTensorMapEncodeTiled, which reports each as "invalid value" alone.
inline void check_tensor_map(const Matrix& m, int box_rows) {
  const char* required = nullptr;
  if (reinterpret_cast<uintptr_t>(m.data) % 16 != 0) required = "start on 16 bytes";
  if (m.width % 8 != 0) required = "have rows of a multiple of 16 bytes";
  if (m.rows < 1 || m.rows > int64_t{1} << 31) required = "have 1 to 2^31 rows";
  if (box_rows < 1 || box_rows > 256) required = "be read in boxes of 1 to 256 rows";
  if (required != nullptr)
    throw std::runtime_error(std::string("a matrix that is loaded by TMA must ") + required);
}

// Boxes of `box_rows` rows by 64 columns with the 128-byte swizzle. A matrix of width 0 is never loaded.
inline TensorMap make_tensor_map(const Matrix& m, int box_rows) {
  TensorMap map{};
  if (m.width == 0) return map;
  check_tensor_map(m, box_rows);
#if defined(__CUDACC__)
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    // A missing symbol is reported in `result` alone.
    if (result != cudaDriverEntryPointSuccess || found == nullptr)
      throw std::runtime_error(
          "this driver lacks cuTensorMapEncodeTiled; install one for CUDA 12 or later");
    return reinterpret_cast<Encode>(found);
  }();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.width), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(m.width) * 2};
  const cuuint32_t box[] = {kPanelWidth, static_cast<cuuint32_t>(box_rows)}, step[] = {1, 1};
  const CUresult error =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(m.data), sizes, strides,
             box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(error));
#else
  map = {m.data, m.rows, m.width, box_rows};
#endif
  return map;
}

// Rewards that are biases alone have no matrix for TMA and run on the portable kernels.
inline bool hopper_accepts(const PolicyOperands& o, Reward reward) {
  if (o.dtype != DType::bfloat16 || reward == Reward::dense) return false;
  if (o.eligible.restricts()) return false; // the portable kernels mask items
  return reward == Reward::none || o.reward_dim > 0;
}

inline int panels_of(int width) { return static_cast<int>(ceil_div(width, kPanelWidth)); }

template <class Kernel>
HopperTileShape hopper_tile_shape(const PassShape& pass) {
  return {Kernel::kBlockN, panels_of(pass.width), panels_of(pass.reward_width),
          Kernel::kColumnVectors};
}

template <class Kernel, class Params>
void launch_hopper(const Params& params, int panels, const HopperPlan& plan, const Call& call) {
  const PolicyParams& o = params.policy;
  const HopperParams<Params> p{make_tensor_map(o.resident, kHopperBlockM),
                               make_tensor_map(o.streamed, Kernel::kBlockN),
                               make_tensor_map(o.reward_resident, kHopperBlockM),
                               make_tensor_map(o.reward_streamed, Kernel::kBlockN),
                               params,
                               panels,
                               panels_of(o.reward_resident.width),
                               plan.resident_stages,
                               plan.work_tiles};
  launch<Kernel>(p, plan.blocks, kHopperThreads, plan.shared_bytes, call);
}

} // namespace offtower::cuda
