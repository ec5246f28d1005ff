// offtower.ops._cpu: addresses and sizes in, nothing of torch. Shapes, types and devices were
// checked in Python before any address got here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../cpu/log_normalizer.h"

namespace py = pybind11;
using namespace offtower::cpu;

namespace {

bool signal_waits() {
  py::gil_scoped_acquire held;
  return PyErr_CheckSignals() != 0;
}

void log_normalizer_py(uintptr_t context, uintptr_t item, uintptr_t item_bias, uintptr_t out,
                       int64_t rows, int64_t items, int64_t dim, int threads,
                       const std::string& isa) {
  const LogNormalizerArgs args{reinterpret_cast<const float*>(context),
                               reinterpret_cast<const float*>(item),
                               reinterpret_cast<const float*>(item_bias),
                               reinterpret_cast<float*>(out),
                               rows,
                               items,
                               dim};
  const Kernel& kernel = choose_kernel(isa.c_str());
  bool finished;
  {
    py::gil_scoped_release released;
    finished = log_normalizer(args, kernel, threads, signal_waits);
  }
  if (!finished) throw py::error_already_set();
}

std::vector<std::string> isas() {
#if defined(__x86_64__)
  return {"avx512", "avx2", "portable"};
#else
  return {"portable"};
#endif
}

} // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU operators of offtower.";
  m.def("log_normalizer", &log_normalizer_py,
        "log sum_a exp s_a of float32 rows, into `out`; addresses of contiguous arrays.");
  m.def("isas", &isas, "Instruction sets that this library was built for.");
  m.def("isa", [] { return std::string(choose_kernel("").isa); },
        "The instruction set that this machine runs.");
}
