// offtower.ops._cpu.
#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/instruction_sets.h"
#include "../cpu/philox.h"
#include "list_arguments.h"

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

// Throws std::invalid_argument if the operands are not on the CPU, an action, a group or an excluded
// item is out of range, or the instruction set is not there.
const Kernels& kernels_for(const Operands& operands, const std::string& isa) {
  operands.require_device({dlpack::kCPU, 0});
  const PolicyOperands& o = operands.policy();
  if (o.dtype == DType::tfloat32) throw std::invalid_argument("the CPU has no tf32 products");
  for (int64_t row = 0; o.action != nullptr && row < o.rows; ++row)
    if (o.action[row] >= o.items)
      throw std::invalid_argument("action " + std::to_string(o.action[row]) + " in row " +
                                  std::to_string(row) + " is out of range: there are " +
                                  std::to_string(o.items) + " items");
  const Eligibility& e = o.eligible;
  for (int64_t row = 0; e.group != nullptr && row < o.rows; ++row)
    if (e.group[row] < 0 || e.group[row] >= e.groups)
      throw std::invalid_argument("group " + std::to_string(e.group[row]) + " of row " +
                                  std::to_string(row) + " is out of range: the bitmap has " +
                                  std::to_string(e.groups) + " rows");
  if (e.excluded.offsets != nullptr)
    check_lists("excluded", e.excluded, operands.excluded_count(), o.items);
  return choose_set(isa.c_str()).of(o.dtype);
}

// As above, for lists with `entries` of a matrix of `limit` rows.
const Kernels& kernels_for(const ItemLists& lists, DType dtype, dlpack::Device device,
                           int64_t entries, int64_t limit, const std::string& isa) {
  if (device.type != dlpack::kCPU)
    throw std::invalid_argument("the lists must be on the CPU, but are on DLPack device " +
                                text(device));
  check_lists("the lists", lists, entries, limit);
  return choose_set(isa.c_str()).of(dtype);
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
    if (set->is_supported()) names.emplace_back(set->name);
  return names;
}

} // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU operators of offtower.";
  define_operands(m);
  const auto threads = py::arg("threads"), isa = py::arg("isa");
  define_forward<int, const std::string&>(
      m,
      [](const Operands& o, const ForwardResults& results, int count, const std::string& set) {
        const Kernels& kernels = kernels_for(o, set);
        run(count, [&](Workers& workers) { return kernels.forward(o.policy(), results, workers); });
      },
      threads, isa);
  define_backward<int, const std::string&>(
      m,
      [](const Operands& o, const BackwardOperands& in, const BackwardResults& results, int count,
         const std::string& set) {
        const Kernels& kernels = kernels_for(o, set);
        run(count, [&](Workers& workers) { return kernels.backward(in, results, workers); });
      },
      threads, isa);
  define_top_k<int, const std::string&>(
      m,
      [](const Operands& o, const TopKResults& results, int count, const std::string& set) {
        const Kernels& kernels = kernels_for(o, set);
        run(count, [&](Workers& workers) { return kernels.top_k(o.policy(), results, workers); });
      },
      threads, isa);
  m.def(
      "draw",
      [](const Operands& o, int64_t samples, bool replacement, uint64_t seed, int64_t tile,
         const py::capsule& stream, const py::capsule& index, const py::capsule& log_prob,
         const py::capsule& reference_max, const py::capsule& total, int count,
         const std::string& set) {
        const Kernels& kernels = kernels_for(o, set);
        if (samples < 1 || samples > INT32_MAX)
          throw std::invalid_argument("samples must lie in [1, 2^31), got " +
                                      std::to_string(samples));
        if (tile < 1 || tile % kTileUnit != 0)
          throw std::invalid_argument("tile must be a positive multiple of " +
                                      std::to_string(kTileUnit) + ", got " + std::to_string(tile));
        const int64_t rows = o.policy().rows;
        const DrawResults results{samples,
                                  replacement,
                                  seed,
                                  tile,
                                  o.at<int64_t>(stream, "stream", {rows}),
                                  o.at<int64_t>(index, "item", {rows, samples}),
                                  o.at<float>(log_prob, "log_prob", {rows, samples}),
                                  o.of_rows(reference_max, "reference_max"),
                                  o.of_rows(total, "total")};
        run(count, [&](Workers& workers) { return kernels.draw(o.policy(), results, workers); });
      },
      py::arg("operands"), py::kw_only(), py::arg("samples"), py::arg("replacement"),
      py::arg("seed"), py::arg("tile"), py::arg("stream"), py::arg("item"), py::arg("log_prob"),
      py::arg("reference_max"), py::arg("total"), threads, isa);
  m.def(
      "philox",
      [](const std::array<uint32_t, 4>& counter, uint64_t key) {
        const PhiloxWords x = philox({{counter[0], counter[1], counter[2], counter[3]}}, key);
        return std::array<uint32_t, 4>{x.word[0], x.word[1], x.word[2], x.word[3]};
      },
      py::arg("counter"), py::arg("key"), "Four random words of Philox-4x32-10.");
  define_list_dots<int, const std::string&>(
      m,
      [](const ListDots& x, dlpack::Device device, int64_t entries, int64_t limit, int count,
         const std::string& set) {
        const Kernels& kernels = kernels_for(x.lists, x.dtype, device, entries, limit, set);
        run(count, [&](Workers& workers) { return kernels.list_dots(x, workers); });
      },
      threads, isa);
  define_list_sums<int, const std::string&>(
      m,
      [](const ListSums& x, dlpack::Device device, int64_t entries, int64_t limit, int count,
         const std::string& set) {
        const Kernels& kernels = kernels_for(x.lists, x.dtype, device, entries, limit, set);
        run(count, [&](Workers& workers) { return kernels.list_sums(x, workers); });
      },
      threads, isa);
  m.def("multiply_add_rate", &multiply_add_rate, py::arg("dtype"), py::arg("threads"),
        py::arg("isa") = "",
        "Multiply-adds, counted as two, a second of all threads in registers alone.");
  m.def("uses_torch_threads", &uses_torch_threads,
        "Whether calls run on torch's OpenMP threads; else on threads of their own.");
  m.def("isas", &isas, "Instruction sets that this library was built for, fastest first.");
  m.def("isas_here", &isas_here, "Those that this machine runs.");
}
