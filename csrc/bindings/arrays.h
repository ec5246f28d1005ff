// Arrays from Python, as DLPack capsules. Element type, shape, strides and device are checked here, in
// addition to the checks in Python, before a kernel reads or writes an array.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace offtower {

namespace py = pybind11;

// The head of DLManagedTensor in an unversioned capsule (dlpack.h, unchanged since version 0.2), as
// torch.utils.dlpack.to_dlpack exports it.
namespace dlpack {
constexpr int32_t kCPU = 1, kCUDA = 2;
struct Device {
  int32_t type, number;
};
struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } element;
  int64_t* shape;
  int64_t* strides; // in elements; null if contiguous
  uint64_t byte_offset;
};
} // namespace dlpack

using Capsule = std::optional<py::capsule>;
using Shape = std::vector<int64_t>;

enum class Element { float32, bfloat16, int64, int32, uint8 };

inline const char* name_of(Element element) {
  switch (element) {
    case Element::float32:
      return "float32";
    case Element::bfloat16:
      return "bfloat16";
    case Element::int64:
      return "int64";
    case Element::int32:
      return "int32";
    default:
      return "uint8";
  }
}

inline std::string text(const Shape& shape) {
  std::string all = "(";
  for (size_t i = 0; i < shape.size(); ++i) all += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return all + (shape.size() == 1 ? ",)" : ")");
}

inline std::string text(dlpack::Device device) { return text(Shape{device.type, device.number}); }

class Array {
public:
  Array(const py::capsule& capsule, const char* name) : name_(name) {
    if (!PyCapsule_IsValid(capsule.ptr(), "dltensor")) refuse("must be an unused DLPack capsule");
    tensor_ = capsule.get_pointer<dlpack::Tensor>();
  }

  dlpack::Device device() const { return tensor_->device; }
  Shape shape() const { return {tensor_->shape, tensor_->shape + tensor_->dimensions}; }

  bool holds(Element element) const {
    constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4;
    const auto is = [&](uint8_t code, uint8_t bits) {
      return tensor_->element.code == code && tensor_->element.bits == bits &&
             tensor_->element.lanes == 1;
    };
    switch (element) {
      case Element::float32:
        return is(kFloat, 32);
      case Element::bfloat16:
        return is(kBfloat, 16);
      case Element::int64:
        return is(kInt, 64);
      case Element::int32:
        return is(kInt, 32);
      default:
        return is(kUInt, 8);
    }
  }

  // The address of the first element.
  // Throws std::invalid_argument unless the array is contiguous and as stated.
  void* data(Element element, const Shape& wanted, dlpack::Device on) const {
    if (!holds(element))
      refuse(std::string("must be ") + name_of(element) + ", but its DLPack type is (" +
             std::to_string(tensor_->element.code) + ", " + std::to_string(tensor_->element.bits) +
             " bits)");
    if (shape() != wanted) refuse("must have shape " + text(wanted) + ", but has " + text(shape()));
    if (!contiguous()) refuse("must be contiguous");
    if (device().type != on.type || device().number != on.number)
      refuse("must be on DLPack device " + text(on) + ", but is on " + text(device()));
    return static_cast<char*>(tensor_->data) + tensor_->byte_offset;
  }

  [[noreturn]] void refuse(const std::string& why) const {
    throw std::invalid_argument(std::string(name_) + " " + why);
  }

private:
  bool contiguous() const {
    if (tensor_->strides == nullptr) return true;
    int64_t stride = 1;
    for (int32_t i = tensor_->dimensions - 1; i >= 0; --i) {
      if (tensor_->shape[i] == 0) return true;
      if (tensor_->shape[i] != 1 && tensor_->strides[i] != stride) return false;
      stride *= tensor_->shape[i];
    }
    return true;
  }

  const char* name_;
  const dlpack::Tensor* tensor_ = nullptr;
};

} // namespace offtower
