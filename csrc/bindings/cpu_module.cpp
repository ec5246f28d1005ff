// offtower.ops._cpu. Shapes, types, strides and devices were checked in Python before any address got
// here.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "../cpu/instruction_sets.h"
#include "arguments.h"

using namespace offtower;
using namespace offtower::cpu;

namespace {

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
  define_operands(m);
  const auto threads = py::arg("threads"), isa = py::arg("isa");
  define_forward<int, const std::string&>(
      m,
      [](const PolicyOperands& o, const ForwardResults& results, int count, const std::string& set) {
        const Kernels& kernels = choose_set(set.c_str()).of(o.dtype);
        run(count, [&](Workers& workers) { return kernels.forward(o, results, workers); });
      },
      threads, isa);
  define_backward<int, const std::string&>(
      m,
      [](const BackwardOperands& in, const BackwardResults& results, int count,
         const std::string& set) {
        const Kernels& kernels = choose_set(set.c_str()).of(in.policy.dtype);
        run(count, [&](Workers& workers) { return kernels.backward(in, results, workers); });
      },
      threads, isa);
  define_top_k<int, const std::string&>(
      m,
      [](const PolicyOperands& o, const TopKResults& results, int count, const std::string& set) {
        const Kernels& kernels = choose_set(set.c_str()).of(o.dtype);
        run(count, [&](Workers& workers) { return kernels.top_k(o, results, workers); });
      },
      threads, isa);
  m.def("multiply_add_rate", &multiply_add_rate, py::arg("dtype"), py::arg("threads"),
        py::arg("isa") = "",
        "Multiply-adds, counted as two, a second of all threads in registers alone.");
  m.def("uses_torch_threads", &uses_torch_threads,
        "Whether calls run on torch's OpenMP threads; else on threads of their own.");
  m.def("isas", &isas, "Instruction sets that this library was built for, widest first.");
  m.def("isas_here", &isas_here, "Those that this machine runs.");
}
