// Arguments of the products over candidate lists; see arguments.h.
#pragma once

#include "arguments.h"

namespace offtower {

// The element type of an array of numbers. Throws std::invalid_argument for others.
inline DType number_type(const Array& array) {
  if (array.holds(Element::bfloat16)) return DType::bfloat16;
  if (!array.holds(Element::float32)) array.refuse("must be float32 or bfloat16");
  return DType::float32;
}

inline Shape matrix_shape(const Array& array) {
  if (array.shape().size() != 2) array.refuse("must have two dimensions");
  return array.shape();
}

inline Shape vector_shape(const Array& array) {
  if (array.shape().size() != 1) array.refuse("must have one dimension");
  return array.shape();
}

// Lists of `rows` rows; their values are not looked at.
inline ItemLists lists_from(const Array& offsets, const Array& items, int64_t rows,
                            dlpack::Device device) {
  return {rows, static_cast<const int64_t*>(offsets.data(Element::int64, {rows + 1}, device)),
          static_cast<const int64_t*>(items.data(Element::int64, vector_shape(items), device))};
}

// Throws std::invalid_argument unless offsets rise from 0 to `entries` and all items are below `limit`.
// For arrays on the CPU.
inline void check_lists(const char* name, const ItemLists& lists, int64_t entries, int64_t limit) {
  const auto refuse = [&](const std::string& why) {
    throw std::invalid_argument(std::string(name) + " " + why);
  };
  if (lists.offsets[0] != 0 || lists.offsets[lists.rows] != entries)
    refuse("must have offsets from 0 to " + std::to_string(entries));
  for (int64_t row = 0; row < lists.rows; ++row)
    if (lists.offsets[row] > lists.offsets[row + 1])
      refuse("must have rising offsets, but they fall after row " + std::to_string(row));
  for (int64_t e = 0; e < entries; ++e)
    if (lists.items[e] < 0 || lists.items[e] >= limit)
      refuse("has item " + std::to_string(lists.items[e]) + ", out of range: there are " +
             std::to_string(limit));
}

// `run(ListDots, device of the operands, number of entries, number of matrix rows, rest...)`.
template <class... Rest, class Run, class... Names>
void define_list_dots(py::module_& m, Run run, Names... names) {
  m.def(
      "list_dots",
      [run](const py::capsule& rows, const py::capsule& matrix, const py::capsule& offsets,
            const py::capsule& items, const py::capsule& dots, Rest... rest) {
        const Array u(rows, "rows"), v(matrix, "matrix"), entries(items, "items");
        const dlpack::Device device = u.device();
        const DType dtype = number_type(u);
        const Element element = dtype == DType::bfloat16 ? Element::bfloat16 : Element::float32;
        const Shape shape = matrix_shape(u);
        const int64_t count = matrix_shape(v)[0];
        const ListDots x{
            dtype,
            shape[1],
            u.data(element, shape, device),
            v.data(element, {count, shape[1]}, device),
            lists_from(Array(offsets, "offsets"), entries, shape[0], device),
            static_cast<float*>(
                Array(dots, "dots").data(Element::float32, vector_shape(entries), device))};
        return run(x, device, vector_shape(entries)[0], count, rest...);
      },
      py::kw_only(), py::arg("rows"), py::arg("matrix"), py::arg("offsets"), py::arg("items"),
      py::arg("dots"), names...);
}

// `run(ListSums, device of the operands, number of entries, number of matrix rows, rest...)`.
template <class... Rest, class Run, class... Names>
void define_list_sums(py::module_& m, Run run, Names... names) {
  m.def(
      "list_sums",
      [run](const py::capsule& weight, const py::capsule& matrix, const py::capsule& offsets,
            const py::capsule& items, const py::capsule& sums, Rest... rest) {
        const Array v(matrix, "matrix"), entries(items, "items"), out(sums, "sums");
        const dlpack::Device device = v.device();
        const DType dtype = number_type(v);
        const Element element = dtype == DType::bfloat16 ? Element::bfloat16 : Element::float32;
        const Shape shape = matrix_shape(v);
        const int64_t rows = matrix_shape(out)[0];
        const ListSums x{
            dtype,
            shape[1],
            static_cast<const float*>(
                Array(weight, "weight").data(Element::float32, vector_shape(entries), device)),
            v.data(element, shape, device),
            lists_from(Array(offsets, "offsets"), entries, rows, device),
            static_cast<float*>(out.data(Element::float32, {rows, shape[1]}, device))};
        return run(x, device, vector_shape(entries)[0], shape[0], rest...);
      },
      py::kw_only(), py::arg("weight"), py::arg("matrix"), py::arg("offsets"), py::arg("items"),
      py::arg("sums"), names...);
}

} // namespace offtower
