// offtower.ops._cpu: addresses and sizes in, nothing of torch. Shapes, types, strides and devices
// were checked in Python before any address got here; an address of 0 stands for an absent array.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "../cpu/instruction_sets.h"

namespace py = pybind11;
using namespace offtower;
using namespace offtower::cpu;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

bool signal_waits() {
  py::gil_scoped_acquire held;
  return PyErr_CheckSignals() != 0;
}

// Without the GIL; raises what a signal handler raised, if one did.
template <class Call>
void run(int threads, Call call) {
  bool finished;
  {
    py::gil_scoped_release released;
    Workers workers(threads, signal_waits);
    finished = call(workers);
  }
  if (!finished) throw py::error_already_set();
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

double multiply_add_rate(int dtype, int threads, const std::string& isa) {
  struct Shared {
    const Kernels& kernels;
    std::mutex guard;
    double sum;
  } shared{choose_set(isa.c_str()).of(static_cast<DType>(dtype)), {}, 0.0};
  const auto measure = [](void* context, int64_t, int) {
    Shared& mine = *static_cast<Shared*>(context);
    const double rate = mine.kernels.multiply_add_rate();
    const std::lock_guard<std::mutex> held(mine.guard);
    mine.sum += rate;
  };
  run(threads, [&](Workers& workers) { return workers.run(threads, measure, &shared); });
  return shared.sum;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const InstructionSet* set : built_sets()) names.emplace_back(set->name);
  return names;
}

std::vector<std::string> isas_here() {
  std::vector<std::string> names;
  for (const InstructionSet* set : built_sets())
    if (set->runs_here()) names.emplace_back(set->name);
  return names;
}

} // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU operators of offtower.";
  py::class_<PolicyOperands>(m, "Operands")
      .def(py::init(&operands), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("items"),
           py::arg("dim"), py::arg("context"), py::arg("item"), py::arg("item_bias") = 0,
           py::arg("action") = 0, py::arg("temperature") = 1.0, py::arg("reward") = 0,
           py::arg("dense") = 0, py::arg("reward_dim") = 0, py::arg("reward_context") = 0,
           py::arg("reward_item") = 0, py::arg("reward_bias") = 0);
  m.def(
      "forward",
      [](const PolicyOperands& o, Address log_prob, Address log_normalizer,
         Address expected_reward, Address action_reward, Address entropy, Address anchor,
         Address total, Address reward_sum, Address centred_sum, Address action_logit, int threads,
         const std::string& isa) {
        const ForwardResults results{at<float>(log_prob),        at<float>(log_normalizer),
                                     at<float>(expected_reward), at<float>(action_reward),
                                     at<float>(entropy),         at<float>(anchor),
                                     at<float>(total),           at<float>(reward_sum),
                                     at<float>(centred_sum),     at<float>(action_logit)};
        const Kernels& kernels = choose_set(isa.c_str()).of(o.dtype);
        run(threads, [&](Workers& workers) { return kernels.forward(o, results, workers); });
      },
      py::arg("operands"), py::kw_only(), py::arg("log_prob") = 0, py::arg("log_normalizer") = 0,
      py::arg("expected_reward") = 0, py::arg("action_reward") = 0, py::arg("entropy") = 0,
      py::arg("anchor") = 0, py::arg("total") = 0, py::arg("reward_sum") = 0,
      py::arg("centred_sum") = 0, py::arg("action_logit") = 0, py::arg("threads"), py::arg("isa"));
  m.def(
      "backward",
      [](const PolicyOperands& o, Address anchor, Address total, Address expected_reward,
         Address entropy, Address g_log_prob, Address g_log_normalizer, Address g_expected_reward,
         Address g_entropy, Address context, Address item, Address item_bias, int threads,
         const std::string& isa) {
        const BackwardOperands in{o,
                                  at<float>(anchor),
                                  at<float>(total),
                                  at<float>(expected_reward),
                                  at<float>(entropy),
                                  {at<float>(g_log_prob), at<float>(g_log_normalizer),
                                   at<float>(g_expected_reward), at<float>(g_entropy)}};
        const BackwardResults results{at<void>(context), at<void>(item), at<void>(item_bias)};
        const Kernels& kernels = choose_set(isa.c_str()).of(o.dtype);
        run(threads, [&](Workers& workers) { return kernels.backward(in, results, workers); });
      },
      py::arg("operands"), py::kw_only(), py::arg("anchor"), py::arg("total"),
      py::arg("expected_reward") = 0, py::arg("entropy") = 0, py::arg("g_log_prob") = 0,
      py::arg("g_log_normalizer") = 0, py::arg("g_expected_reward") = 0, py::arg("g_entropy") = 0,
      py::arg("context") = 0, py::arg("item") = 0, py::arg("item_bias") = 0, py::arg("threads"),
      py::arg("isa"));
  m.def(
      "top_k",
      [](const PolicyOperands& o, int64_t k, Address score, Address index, int threads,
         const std::string& isa) {
        const TopKResults results{k, at<float>(score), at<int64_t>(index)};
        const Kernels& kernels = choose_set(isa.c_str()).of(o.dtype);
        run(threads, [&](Workers& workers) { return kernels.top_k(o, results, workers); });
      },
      py::arg("operands"), py::kw_only(), py::arg("k"), py::arg("score"), py::arg("index"),
      py::arg("threads"), py::arg("isa"));
  m.def("multiply_add_rate", &multiply_add_rate, py::arg("dtype"), py::arg("threads"),
        py::arg("isa") = "",
        "Multiply-adds, counted as two, a second of all threads in registers alone.");
  m.def("uses_torch_threads", &uses_torch_threads,
        "Whether calls run on torch's OpenMP threads; else on threads of their own.");
  m.def("isas", &isas, "Instruction sets that this library was built for, widest first.");
  m.def("isas_here", &isas_here, "Those that this machine runs.");
}
