// What the modules of both cores take: addresses and sizes in, nothing of torch. An address of 0 stands
// for an absent array. Each core adds its own last arguments (threads, or a stream) to the lists here.
// Their types for Python are in ops/addresses.py.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "../operands.h"

namespace offtower {

namespace py = pybind11;
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline PolicyOperands operands(int dtype, int64_t rows, int64_t items, int64_t dim, Address context,
                               Address item, Address item_bias, Address action, double temperature,
                               int reward, Address dense, int64_t reward_dim,
                               Address reward_context, Address reward_item, Address reward_bias) {
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

inline void define_operands(py::module_& m) {
  py::class_<PolicyOperands>(m, "Operands", py::module_local())
      .def(py::init(&operands), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("items"),
           py::arg("dim"), py::arg("context"), py::arg("item"), py::arg("item_bias") = 0,
           py::arg("action") = 0, py::arg("temperature") = 1.0, py::arg("reward") = 0,
           py::arg("dense") = 0, py::arg("reward_dim") = 0, py::arg("reward_context") = 0,
           py::arg("reward_item") = 0, py::arg("reward_bias") = 0);
}

// `run(operands, ForwardResults, rest...)`; `names`: of the rest.
template <class... Rest, class Run, class... Names>
void define_forward(py::module_& m, Run run, Names... names) {
  m.def(
      "forward",
      [run](const PolicyOperands& o, Address log_prob, Address log_normalizer,
            Address expected_reward, Address action_reward, Address entropy, Address anchor,
            Address total, Address reward_sum, Address centred_sum, Address action_logit,
            Rest... rest) {
        const ForwardResults results{at<float>(log_prob),        at<float>(log_normalizer),
                                     at<float>(expected_reward), at<float>(action_reward),
                                     at<float>(entropy),         at<float>(anchor),
                                     at<float>(total),           at<float>(reward_sum),
                                     at<float>(centred_sum),     at<float>(action_logit)};
        return run(o, results, rest...);
      },
      py::arg("operands"), py::kw_only(), py::arg("log_prob") = 0, py::arg("log_normalizer") = 0,
      py::arg("expected_reward") = 0, py::arg("action_reward") = 0, py::arg("entropy") = 0,
      py::arg("anchor") = 0, py::arg("total") = 0, py::arg("reward_sum") = 0,
      py::arg("centred_sum") = 0, py::arg("action_logit") = 0, names...);
}

// `run(BackwardOperands, BackwardResults, rest...)`.
template <class... Rest, class Run, class... Names>
void define_backward(py::module_& m, Run run, Names... names) {
  m.def(
      "backward",
      [run](const PolicyOperands& o, Address anchor, Address total, Address expected_reward,
            Address entropy, Address g_log_prob, Address g_log_normalizer,
            Address g_expected_reward, Address g_entropy, Address context, Address item,
            Address item_bias, Rest... rest) {
        const BackwardOperands in{o,
                                  at<float>(anchor),
                                  at<float>(total),
                                  at<float>(expected_reward),
                                  at<float>(entropy),
                                  {at<float>(g_log_prob), at<float>(g_log_normalizer),
                                   at<float>(g_expected_reward), at<float>(g_entropy)}};
        const BackwardResults results{at<void>(context), at<void>(item), at<void>(item_bias)};
        return run(in, results, rest...);
      },
      py::arg("operands"), py::kw_only(), py::arg("anchor"), py::arg("total"),
      py::arg("expected_reward") = 0, py::arg("entropy") = 0, py::arg("g_log_prob") = 0,
      py::arg("g_log_normalizer") = 0, py::arg("g_expected_reward") = 0, py::arg("g_entropy") = 0,
      py::arg("context") = 0, py::arg("item") = 0, py::arg("item_bias") = 0, names...);
}

// `run(operands, TopKResults, rest...)`.
template <class... Rest, class Run, class... Names>
void define_top_k(py::module_& m, Run run, Names... names) {
  m.def(
      "top_k",
      [run](const PolicyOperands& o, int64_t k, Address score, Address index, Rest... rest) {
        return run(o, TopKResults{k, at<float>(score), at<int64_t>(index)}, rest...);
      },
      py::arg("operands"), py::kw_only(), py::arg("k"), py::arg("score"), py::arg("index"), names...);
}

} // namespace offtower
