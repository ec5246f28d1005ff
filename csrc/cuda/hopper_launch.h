// Launches of Hopper's kernels: bfloat16, no dense rewards. Built where sm_90a is.
#pragma once

#include "kernels/hopper_forward.h"
#include "kernels/hopper_gradient.h"
#include "launch.h"

namespace offtower::cuda {

// What cuTensorMapEncodeTiled wants of a matrix and a box; it says "invalid value" of each alike.
inline void check_map(const Matrix& m, int box_rows) {
  const char* wrong = nullptr;
  if (reinterpret_cast<uintptr_t>(m.data) % 16 != 0) wrong = "starts on 16 bytes";
  if (m.width % 8 != 0) wrong = "has rows of whole 16 bytes";
  if (m.rows < 1 || m.rows > int64_t{1} << 31) wrong = "has 1 to 2^31 rows";
  if (box_rows < 1 || box_rows > 256) wrong = "is read in boxes of up to 256 rows";
  if (wrong != nullptr)
    throw std::runtime_error(std::string("the copy engine needs a matrix that ") + wrong);
}

// Rows of 64 numbers at a time, `box_rows` of them, through the 128-byte swizzle. A matrix of no width
// is never read.
inline TensorMap tensor_map(const Matrix& m, int box_rows) {
  TensorMap map{};
  if (m.width == 0) return map;
  check_map(m, box_rows);
#if defined(__CUDACC__)
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess || found == nullptr) // which is no error of its own
      throw std::runtime_error("this driver has no cuTensorMapEncodeTiled; it needs CUDA 12 or later");
    return reinterpret_cast<Encode>(found);
  }();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.width), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(m.width) * 2};
  const cuuint32_t box[] = {kPanelWidth, static_cast<cuuint32_t>(box_rows)}, step[] = {1, 1};
  const CUresult error =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(m.data), sizes, strides, box,
             step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(error));
#else
  map = {m.data, m.rows, m.width, box_rows};
#endif
  return map;
}

// bfloat16, and rewards that are none or have embeddings: with biases alone there is nothing to copy.
inline bool taken(const PolicyOperands& o, bool reward) {
  if (o.dtype != DType::bfloat16) return false;
  return !reward || o.reward == RewardKind::none || (is_factored(o.reward) && o.reward_dim > 0);
}

inline int panels_of(int width) { return static_cast<int>(ceil_div(width, kPanelWidth)); }

// `rows.policy` is complete but for its stages, which are the plan's.
template <class Kernel, class Rows>
void launch_hopper(Rows rows, int panels, const HopperPlan& plan, const Call& call) {
  rows.policy.stages = plan.stages;
  const Problem& o = rows.policy;
  const HopperProblem<Rows> p{tensor_map(o.stay, kHopperRows),
                              tensor_map(o.stream, Kernel::kColumns),
                              tensor_map(o.reward_stay, kHopperRows),
                              tensor_map(o.reward_stream, Kernel::kColumns),
                              rows,
                              panels,
                              panels_of(o.reward_stay.width),
                              plan.stay_stages,
                              plan.works};
  launch<Kernel>(p, plan.blocks, kHopperThreads, plan.shared_bytes, call);
}

} // namespace offtower::cuda
