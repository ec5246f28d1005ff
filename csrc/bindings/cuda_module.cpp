// offtower.ops._cuda: addresses and sizes in, nothing of torch. Shapes, types, strides, alignment and
// devices were checked in Python before any address got here; an address of 0 stands for an absent array.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../cuda/operators.h"

namespace py = pybind11;
using namespace offtower;
using namespace offtower::cuda;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

PolicyOperands operands(int dtype, int64_t rows, int64_t items, int64_t dim, Address context,
                        Address item, Address item_bias, Address action, double temperature,
                        int reward, Address dense, int64_t reward_dim, Address reward_context,
                        Address reward_item, Address reward_bias) {
  return {static_cast<DType>(dtype),
          rows,
          items,
          dim,
          at<void>(context),
          at<void>(item),
          at<void>(item_bias),
          at<int64_t>(action),
          static_cast<float>(temperature),
          static_cast<RewardKind>(reward),
          at<void>(dense),
          reward_dim,
          at<void>(reward_context),
          at<void>(reward_item),
          at<void>(reward_bias)};
}

Call call(int device, Address stream, Address workspace) {
  return {device_facts(device), at<void>(stream), at<void>(workspace)};
}

} // namespace

PYBIND11_MODULE(OFFTOWER_CUDA_MODULE, m) {
  m.doc() = "CUDA operators of offtower. Without a workspace a call only counts the bytes it needs.";
  py::class_<PolicyOperands>(m, "Operands", py::module_local())
      .def(py::init(&operands), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("items"),
           py::arg("dim"), py::arg("context"), py::arg("item"), py::arg("item_bias") = 0,
           py::arg("action") = 0, py::arg("temperature") = 1.0, py::arg("reward") = 0,
           py::arg("dense") = 0, py::arg("reward_dim") = 0, py::arg("reward_context") = 0,
           py::arg("reward_item") = 0, py::arg("reward_bias") = 0);
  m.def(
      "forward",
      [](const PolicyOperands& o, Address log_prob, Address log_normalizer,
         Address expected_reward, Address action_reward, Address entropy, Address anchor,
         Address total, Address reward_sum, Address centred_sum, Address action_logit, int device,
         Address stream, Address workspace) {
        const ForwardResults results{at<float>(log_prob),        at<float>(log_normalizer),
                                     at<float>(expected_reward), at<float>(action_reward),
                                     at<float>(entropy),         at<float>(anchor),
                                     at<float>(total),           at<float>(reward_sum),
                                     at<float>(centred_sum),     at<float>(action_logit)};
        return forward(o, results, call(device, stream, workspace));
      },
      py::arg("operands"), py::kw_only(), py::arg("log_prob") = 0, py::arg("log_normalizer") = 0,
      py::arg("expected_reward") = 0, py::arg("action_reward") = 0, py::arg("entropy") = 0,
      py::arg("anchor") = 0, py::arg("total") = 0, py::arg("reward_sum") = 0,
      py::arg("centred_sum") = 0, py::arg("action_logit") = 0, py::arg("device"),
      py::arg("stream") = 0, py::arg("workspace") = 0);
  m.def(
      "backward",
      [](const PolicyOperands& o, Address anchor, Address total, Address expected_reward,
         Address entropy, Address g_log_prob, Address g_log_normalizer, Address g_expected_reward,
         Address g_entropy, Address context, Address item, Address item_bias, int device,
         Address stream, Address workspace) {
        const BackwardOperands in{o,
                                  at<float>(anchor),
                                  at<float>(total),
                                  at<float>(expected_reward),
                                  at<float>(entropy),
                                  {at<float>(g_log_prob), at<float>(g_log_normalizer),
                                   at<float>(g_expected_reward), at<float>(g_entropy)}};
        const BackwardResults results{at<void>(context), at<void>(item), at<void>(item_bias)};
        return backward(in, results, call(device, stream, workspace));
      },
      py::arg("operands"), py::kw_only(), py::arg("anchor"), py::arg("total"),
      py::arg("expected_reward") = 0, py::arg("entropy") = 0, py::arg("g_log_prob") = 0,
      py::arg("g_log_normalizer") = 0, py::arg("g_expected_reward") = 0, py::arg("g_entropy") = 0,
      py::arg("context") = 0, py::arg("item") = 0, py::arg("item_bias") = 0, py::arg("device"),
      py::arg("stream") = 0, py::arg("workspace") = 0);
  m.def(
      "top_k",
      [](const PolicyOperands& o, int64_t k, Address score, Address index, int device,
         Address stream, Address workspace) {
        return top_k(o, {k, at<float>(score), at<int64_t>(index)}, call(device, stream, workspace));
      },
      py::arg("operands"), py::kw_only(), py::arg("k"), py::arg("score"), py::arg("index"),
      py::arg("device"), py::arg("stream") = 0, py::arg("workspace") = 0);
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
}
