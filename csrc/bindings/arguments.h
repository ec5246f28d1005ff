// Arguments of the modules of both cores: arrays as DLPack capsules, None for an absent one. Each core
// adds its own last arguments (threads, or a stream). ops/_cpu.pyi has their types for Python.
#pragma once

#include <type_traits>

#include "../operands.h"
#include "arrays.h"

namespace offtower {

// A policy's arrays, kept alive, and the pointers that a kernel takes.
class __attribute__((visibility("hidden"))) Operands {
public:
  Operands(const py::capsule& context, const py::capsule& item, const Capsule& item_bias,
           const Capsule& action, double temperature, const Capsule& dense,
           const Capsule& reward_context, const Capsule& reward_item, const Capsule& reward_bias,
           const Capsule& group, const Capsule& bitmap, const Capsule& excluded_offsets,
           const Capsule& excluded_items, bool sigmoid, bool tfloat32) {
    const Array u(context, "context"), v(item, "item");
    device_ = u.device();
    element_ = u.holds(Element::bfloat16) ? Element::bfloat16 : Element::float32;
    if (u.shape().size() != 2) u.refuse("must have two dimensions");
    if (v.shape().size() != 2) v.refuse("must have two dimensions");
    if (tfloat32 && element_ != Element::float32) u.refuse("must be float32 for tf32 products");
    const int64_t rows = u.shape()[0], dim = u.shape()[1], items = v.shape()[0];
    policy_.dtype = element_ == Element::bfloat16 ? DType::bfloat16
                    : tfloat32                    ? DType::tfloat32
                                                  : DType::float32;
    policy_.rows = rows;
    policy_.items = items;
    policy_.dim = dim;
    policy_.context = keep(context, "context", element_, {rows, dim});
    policy_.item = keep(item, "item", element_, {items, dim});
    policy_.item_bias = keep(item_bias, "item_bias", element_, {items});
    policy_.action = static_cast<const int64_t*>(keep(action, "action", Element::int64, {rows}));
    policy_.temperature = static_cast<float>(temperature);
    if (dense) {
      policy_.reward = RewardKind::dense;
      policy_.dense = keep(dense, "dense", element_, {rows, items});
    } else if (reward_context && reward_item) {
      const Array e(*reward_context, "reward_context");
      if (e.shape().size() != 2) e.refuse("must have two dimensions");
      const int64_t width = e.shape()[1];
      policy_.reward = sigmoid ? RewardKind::sigmoid : RewardKind::identity;
      policy_.reward_dim = width;
      policy_.reward_context = keep(reward_context, "reward_context", element_, {rows, width});
      policy_.reward_item = keep(reward_item, "reward_item", element_, {items, width});
      policy_.reward_bias = keep(reward_bias, "reward_bias", element_, {items});
    } else if (reward_context || reward_item || reward_bias) {
      throw std::invalid_argument("reward_context and reward_item must be given together");
    }
    keep_eligible(group, bitmap, excluded_offsets, excluded_items);
  }

  const PolicyOperands& policy() const { return policy_; }
  int64_t excluded_count() const { return excluded_count_; }
  // Throws std::invalid_argument unless the arrays are on this device.
  void require_device(dlpack::Device device) const {
    if (device_.type != device.type || device_.number != device.number)
      throw std::invalid_argument("the operands must be on DLPack device " + text(device) +
                                  ", but are on " + text(device_));
  }

  // The address of a result or of another operand of a call on these; null if it is absent.
  template <class T>
  T* at(const Capsule& array, const char* name, const Shape& shape) const {
    constexpr bool kIndex = std::is_same_v<T, int64_t>, kFloat = std::is_same_v<T, float>;
    const Element element = kIndex ? Element::int64 : kFloat ? Element::float32 : element_;
    return array ? static_cast<T*>(Array(*array, name).data(element, shape, device_)) : nullptr;
  }
  float* of_rows(const Capsule& array, const char* name) const {
    return at<float>(array, name, {policy_.rows});
  }

private:
  const void* keep(const Capsule& array, const char* name, Element element, const Shape& shape) {
    if (!array) return nullptr;
    kept_.push_back(*array);
    return Array(*array, name).data(element, shape, device_);
  }

  void keep_eligible(const Capsule& group, const Capsule& bitmap, const Capsule& offsets,
                     const Capsule& items) {
    if (group.has_value() != bitmap.has_value())
      throw std::invalid_argument("group and bitmap must be given together");
    if (offsets.has_value() != items.has_value())
      throw std::invalid_argument("excluded_offsets and excluded_items must be given together");
    Eligibility& e = policy_.eligible;
    if (bitmap) {
      const Array words(*bitmap, "bitmap");
      if (words.shape().size() != 2) words.refuse("must have two dimensions");
      e.groups = words.shape()[0];
      e.words = (policy_.items + 63) / 64;
      e.group = static_cast<const int32_t*>(keep(group, "group", Element::int32, {policy_.rows}));
      e.bitmap =
          static_cast<const uint64_t*>(keep(bitmap, "bitmap", Element::int64, {e.groups, e.words}));
    }
    if (offsets) {
      const Array array(*items, "excluded_items");
      if (array.shape().size() != 1) array.refuse("must have one dimension");
      e.excluded.rows = policy_.rows;
      e.excluded.offsets = static_cast<const int64_t*>(
          keep(offsets, "excluded_offsets", Element::int64, {policy_.rows + 1}));
      e.excluded.items =
          static_cast<const int64_t*>(keep(items, "excluded_items", Element::int64, array.shape()));
      excluded_count_ = array.shape()[0];
    }
  }

  PolicyOperands policy_{};
  int64_t excluded_count_ = 0;
  Element element_ = Element::float32;
  dlpack::Device device_{};
  std::vector<py::object> kept_;
};

inline void define_operands(py::module_& m) {
  const auto none = py::none();
  py::class_<Operands>(m, "Operands", py::module_local())
      .def(py::init<const py::capsule&, const py::capsule&, const Capsule&, const Capsule&, double,
                    const Capsule&, const Capsule&, const Capsule&, const Capsule&, const Capsule&,
                    const Capsule&, const Capsule&, const Capsule&, bool, bool>(),
           py::kw_only(), py::arg("context"), py::arg("item"), py::arg("item_bias") = none,
           py::arg("action") = none, py::arg("temperature") = 1.0, py::arg("dense") = none,
           py::arg("reward_context") = none, py::arg("reward_item") = none,
           py::arg("reward_bias") = none, py::arg("group") = none, py::arg("bitmap") = none,
           py::arg("excluded_offsets") = none, py::arg("excluded_items") = none,
           py::arg("sigmoid") = false, py::arg("tfloat32") = false);
}

// `run(Operands, ForwardResults, rest...)`; `names`: of the rest.
template <class... Rest, class Run, class... Names>
void define_forward(py::module_& m, Run run, Names... names) {
  const auto none = py::none();
  m.def(
      "forward",
      [run](const Operands& o, const Capsule& log_prob, const Capsule& log_normalizer,
            const Capsule& expected_reward, const Capsule& action_reward, const Capsule& entropy,
            const Capsule& reference_max, const Capsule& total, const Capsule& reward_sum,
            const Capsule& centered_sum, const Capsule& action_logit, Rest... rest) {
        const ForwardResults results{o.of_rows(log_prob, "log_prob"),
                                     o.of_rows(log_normalizer, "log_normalizer"),
                                     o.of_rows(expected_reward, "expected_reward"),
                                     o.of_rows(action_reward, "action_reward"),
                                     o.of_rows(entropy, "entropy"),
                                     o.of_rows(reference_max, "reference_max"),
                                     o.of_rows(total, "total"),
                                     o.of_rows(reward_sum, "reward_sum"),
                                     o.of_rows(centered_sum, "centered_sum"),
                                     o.of_rows(action_logit, "action_logit")};
        return run(o, results, rest...);
      },
      py::arg("operands"), py::kw_only(), py::arg("log_prob") = none,
      py::arg("log_normalizer") = none, py::arg("expected_reward") = none,
      py::arg("action_reward") = none, py::arg("entropy") = none, py::arg("reference_max") = none,
      py::arg("total") = none, py::arg("reward_sum") = none, py::arg("centered_sum") = none,
      py::arg("action_logit") = none, names...);
}

// `run(Operands, BackwardOperands, BackwardResults, rest...)`.
template <class... Rest, class Run, class... Names>
void define_backward(py::module_& m, Run run, Names... names) {
  const auto none = py::none();
  m.def(
      "backward",
      [run](const Operands& o, const py::capsule& reference_max, const py::capsule& total,
            const Capsule& expected_reward, const Capsule& entropy, const Capsule& g_log_prob,
            const Capsule& g_log_normalizer, const Capsule& g_expected_reward,
            const Capsule& g_entropy, const Capsule& context, const Capsule& item,
            const Capsule& item_bias, Rest... rest) {
        const PolicyOperands& p = o.policy();
        if (g_log_prob && p.action == nullptr)
          throw std::invalid_argument("g_log_prob needs the operands' action");
        if (g_expected_reward && (!expected_reward || p.reward == RewardKind::none))
          throw std::invalid_argument("g_expected_reward needs expected_reward and a reward model");
        if (g_entropy && !entropy) throw std::invalid_argument("g_entropy needs entropy");
        const BackwardOperands in{
            p,
            o.of_rows(reference_max, "reference_max"),
            o.of_rows(total, "total"),
            o.of_rows(expected_reward, "expected_reward"),
            o.of_rows(entropy, "entropy"),
            {o.of_rows(g_log_prob, "g_log_prob"), o.of_rows(g_log_normalizer, "g_log_normalizer"),
             o.of_rows(g_expected_reward, "g_expected_reward"), o.of_rows(g_entropy, "g_entropy")}};
        const BackwardResults results{o.at<void>(context, "context", {p.rows, p.dim}),
                                      o.at<void>(item, "item", {p.items, p.dim}),
                                      o.at<void>(item_bias, "item_bias", {p.items})};
        return run(o, in, results, rest...);
      },
      py::arg("operands"), py::kw_only(), py::arg("reference_max"), py::arg("total"),
      py::arg("expected_reward") = none, py::arg("entropy") = none, py::arg("g_log_prob") = none,
      py::arg("g_log_normalizer") = none, py::arg("g_expected_reward") = none,
      py::arg("g_entropy") = none, py::arg("context") = none, py::arg("item") = none,
      py::arg("item_bias") = none, names...);
}

// `run(Operands, TopKResults, rest...)`.
template <class... Rest, class Run, class... Names>
void define_top_k(py::module_& m, Run run, Names... names) {
  m.def(
      "top_k",
      [run](const Operands& o, int64_t k, const py::capsule& score, const py::capsule& index,
            Rest... rest) {
        const PolicyOperands& p = o.policy();
        if (k < 1 || k > p.items)
          throw std::invalid_argument("k must lie in [1, " + std::to_string(p.items) + "], got " +
                                      std::to_string(k));
        const TopKResults results{k, o.at<float>(score, "score", {p.rows, k}),
                                  o.at<int64_t>(index, "index", {p.rows, k})};
        return run(o, results, rest...);
      },
      py::arg("operands"), py::kw_only(), py::arg("k"), py::arg("score"), py::arg("index"),
      names...);
}

} // namespace offtower
