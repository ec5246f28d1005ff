// offtower.ops._cuda.
#include <cstdint>
#include <string>

#include "../cuda/operators.h"
#include "arguments.h"

using namespace offtower;
using namespace offtower::cuda;

namespace {

#if defined(OFFTOWER_CUDA_EMULATED)
constexpr int32_t kMemory = dlpack::kCPU;
#else
constexpr int32_t kMemory = dlpack::kCUDA;
#endif

// `launch(Call)` with the workspace, or without one if none is given: then it only counts bytes.
// Throws std::invalid_argument if the operands are elsewhere or the workspace is too small.
template <class Launch>
int64_t run(const Operands& operands, int device, uintptr_t stream, const Capsule& workspace,
            Launch launch) {
  operands.require_device({kMemory, device});
  const Device properties = device_properties(device);
  const int64_t bytes = launch(Call{properties, nullptr, nullptr});
  if (!workspace) return bytes;
  const Array room(*workspace, "workspace");
  const Shape shape = room.shape();
  if (shape.size() != 1 || shape[0] < bytes)
    room.refuse("must have one dimension of at least " + std::to_string(bytes) +
                " bytes, but has shape " + text(shape));
  void* const memory = room.data(Element::uint8, shape, {kMemory, device});
  return launch(Call{properties, reinterpret_cast<void*>(stream), memory});
}

} // namespace

PYBIND11_MODULE(OFFTOWER_CUDA_MODULE, m) {
  m.doc() =
      "CUDA operators of offtower. Without a workspace a call only counts the bytes it needs.";
  define_operands(m);
  const auto device = py::arg("device");
  const auto stream = py::arg("stream") = 0;
  const auto workspace = py::arg("workspace") = py::none();
  define_forward<int, uintptr_t, const Capsule&>(
      m,
      [](const Operands& o, const ForwardResults& results, int number, uintptr_t queue,
         const Capsule& room) {
        return run(o, number, queue, room,
                   [&](const Call& call) { return forward(o.policy(), results, call); });
      },
      device, stream, workspace);
  define_backward<int, uintptr_t, const Capsule&>(
      m,
      [](const Operands& o, const BackwardOperands& in, const BackwardResults& results, int number,
         uintptr_t queue, const Capsule& room) {
        return run(o, number, queue, room,
                   [&](const Call& call) { return backward(in, results, call); });
      },
      device, stream, workspace);
  define_top_k<int, uintptr_t, const Capsule&>(
      m,
      [](const Operands& o, const TopKResults& results, int number, uintptr_t queue,
         const Capsule& room) {
        return run(o, number, queue, room,
                   [&](const Call& call) { return top_k(o.policy(), results, call); });
      },
      device, stream, workspace);
  m.def(
      "refusal",
      [](int dtype, int64_t items, int64_t dim, int reward, int64_t reward_dim, int device) {
        PolicyOperands o{};
        o.dtype = static_cast<DType>(dtype);
        o.items = items;
        o.dim = dim;
        o.reward = static_cast<RewardKind>(reward);
        o.reward_dim = reward_dim;
        return refusal(o, device_properties(device));
      },
      py::kw_only(), py::arg("dtype"), py::arg("items"), py::arg("dim"), py::arg("reward"),
      py::arg("reward_dim"), py::arg("device"),
      "Why such operands are not computed on this device, or an empty string.");
  m.def(
      "plans",
      [](int dtype, int64_t rows, int64_t items, int64_t dim, int reward, int64_t reward_dim,
         int device) {
        PolicyOperands o{};
        o.dtype = static_cast<DType>(dtype);
        o.rows = rows;
        o.items = items;
        o.dim = dim;
        o.reward = static_cast<RewardKind>(reward);
        o.reward_dim = reward_dim;
        py::dict all;
        for (const PassPlan& p : plans(o, device_properties(device))) {
          py::dict one;
          one["fits"] = p.fits;
          one["hopper"] = p.hopper;
          one["threads"] = p.threads;
          one["blocks"] = p.blocks;
          one["splits"] = p.splits;
          one["stages"] = p.stages;
          one["shared_bytes"] = p.shared_bytes;
          all[p.name] = one;
        }
        return all;
      },
      py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("items"), py::arg("dim"),
      py::arg("reward"), py::arg("reward_dim"), py::arg("device"),
      "How the passes over such operands are cut into blocks on this device.");
  m.attr("most_k") = kMaxK;
  m.attr("architectures") = OFFTOWER_CUDA_ARCHITECTURES;
  m.attr("sources") = OFFTOWER_CUDA_SOURCES;
}
