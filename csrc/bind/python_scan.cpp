// evaclip.runtime._scan: a search's pass over 8 bits a coordinate, without torch, which takes seconds to
// import.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>

#include "cpu/int8_scan.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace evakernels {
namespace {

template <class T>
using Dense = py::array_t<T, py::array::c_style>;

void require_shape(const py::array& array, const char* name, std::vector<py::ssize_t> shape) {
  const std::vector<py::ssize_t> given(array.shape(), array.shape() + array.ndim());
  if (given != shape) {
    throw py::value_error(std::string(name) + " has shape " + std::string(py::str(py::cast(given))) +
                          "; expected " + std::string(py::str(py::cast(shape))));
  }
}

py::list possible(const Dense<int8_t>& codes, const Dense<float>& about, const Dense<int16_t>& queries,
                  const Dense<float>& about_queries, int64_t top,
                  const std::optional<Dense<int64_t>>& numbers, int threads) {
  if (codes.ndim() != 2 || queries.ndim() != 2) throw py::value_error("codes and queries must be 2-D");
  if (top < 1) throw py::value_error("top must be 1 or more");
  const py::ssize_t rows = codes.shape(0), dim = codes.shape(1), count = queries.shape(0);
  require_shape(about, "about", {rows, 2});
  require_shape(queries, "queries", {count, dim});
  require_shape(about_queries, "about_queries", {count, 3});
  const py::ssize_t compared = numbers ? numbers->size() : rows;
  if (numbers) {
    require_shape(*numbers, "numbers", {compared});
    const auto [least, most] = std::minmax_element(numbers->data(), numbers->data() + compared);
    if (compared && (*least < 0 || *most >= rows)) throw py::value_error("numbers has one of no row");
  }
  const cpu::Int8Scan scan{.codes = codes.data(),
                           .about = reinterpret_cast<const cpu::Int8Row*>(about.data()),
                           .numbers = numbers ? numbers->data() : nullptr,
                           .queries = queries.data(),
                           .about_queries = reinterpret_cast<const cpu::Int16Query*>(about_queries.data()),
                           .compared = compared,
                           .dim = dim,
                           .count = count,
                           .top = top};
  std::vector<std::vector<int64_t>> found;
  {
    const py::gil_scoped_release unlocked;
    found = cpu::int8_scan(scan, cpu::active_isa(), threads);
  }
  py::list result;
  for (const std::vector<int64_t>& one : found) result.append(py::array_t<int64_t>(one.size(), one.data()));
  return result;
}

}  // namespace
}  // namespace evakernels

PYBIND11_MODULE(_scan, m) {
  m.doc() = "A search's pass over embeddings in 8 bits a coordinate.";
  m.def("possible", &evakernels::possible, "codes"_a.noconvert(), "about"_a.noconvert(),
        "queries"_a.noconvert(), "about_queries"_a.noconvert(), "top"_a, "numbers"_a.noconvert(), "threads"_a,
        "As evaclip.runtime.codes.possible, in threads and without Python's lock.");
}
