// offtower.ops._cuda. Shapes, types, strides, alignment and devices were checked in Python before any
// address got here.
#include <cstdint>
#include <string>

#include "../cuda/operators.h"
#include "arguments.h"

using namespace offtower;
using namespace offtower::cuda;

namespace {

Call call(int device, Address stream, Address workspace) {
  return {device_facts(device), at<void>(stream), at<void>(workspace)};
}

} // namespace

PYBIND11_MODULE(OFFTOWER_CUDA_MODULE, m) {
  m.doc() = "CUDA operators of offtower. Without a workspace a call only counts the bytes it needs.";
  define_operands(m);
  const auto device = py::arg("device");
  const auto stream = py::arg("stream") = 0, workspace = py::arg("workspace") = 0;
  define_forward<int, Address, Address>(
      m,
      [](const PolicyOperands& o, const ForwardResults& results, int number, Address queue,
         Address room) { return forward(o, results, call(number, queue, room)); },
      device, stream, workspace);
  define_backward<int, Address, Address>(
      m,
      [](const BackwardOperands& in, const BackwardResults& results, int number, Address queue,
         Address room) { return backward(in, results, call(number, queue, room)); },
      device, stream, workspace);
  define_top_k<int, Address, Address>(
      m,
      [](const PolicyOperands& o, const TopKResults& results, int number, Address queue,
         Address room) { return top_k(o, results, call(number, queue, room)); },
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
        return refusal(o, device_facts(device));
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
        for (const PassPlan& p : plans(o, device_facts(device))) {
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
  m.attr("most_k") = kMostK;
  m.attr("architectures") = OFFTOWER_CUDA_ARCHITECTURES;
  m.attr("sources") = OFFTOWER_CUDA_SOURCES;
}
