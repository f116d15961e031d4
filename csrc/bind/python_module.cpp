// evakernels._C: what was built and what this machine can run, and the launchers on raw buffers.
//
// The launchers write into arrays that the caller allocated and run on the calling thread alone: a way to
// profile a kernel without torch's dispatcher, and to use it on arrays that are not torch's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "bind/array_view.h"
#include "cpu/layer_norm.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace evakernels {
namespace {

using OptionalObject = std::optional<py::object>;

std::vector<std::string> names(const std::vector<cpu::Isa>& isas) {
  std::vector<std::string> result;
  for (cpu::Isa isa : isas) result.emplace_back(cpu::name(isa));
  return result;
}

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

py::dict build_info() {
  return py::dict("version"_a = EVAKERNELS_VERSION, "compiler"_a = EVAKERNELS_COMPILER,
                  "isas_built"_a = names(cpu::built_isas()),
                  "isas_available"_a = names(cpu::available_isas()),
                  "cuda_archs"_a = words(EVAKERNELS_CUDA_ARCHS));
}

cpu::Isa isa_or_active(const std::optional<std::string>& isa) {
  return isa ? cpu::parse_isa(*isa) : cpu::active_isa();
}

std::optional<ArrayView> optional_view(const OptionalObject& array, Access access, const char* name) {
  if (!array) return std::nullopt;
  return std::optional<ArrayView>(std::in_place, *array, access, name);
}

void* data_or_null(const std::optional<ArrayView>& view) { return view ? view->data() : nullptr; }

float* floats(const std::optional<ArrayView>& view) { return static_cast<float*>(data_or_null(view)); }

// The sizes that a layer_norm call is made of, taken from x.
struct Rows {
  int64_t rows;
  int64_t width;

  explicit Rows(const ArrayView& x) {
    if (x.shape().empty()) throw py::value_error("x must have at least one dimension");
    rows = 1;
    for (size_t i = 0; i + 1 < x.shape().size(); ++i) rows *= x.shape()[i];
    width = x.shape().back();
  }
};

void require_like(const ArrayView& array, const ArrayView& x) {
  array.require_shape(x.shape());
  array.require_dtype(x.dtype());
}

// weight, bias and their gradients: [width], all of one dtype, which is x's or float32.
DType parameter_dtype(std::initializer_list<const std::optional<ArrayView>*> parameters, const ArrayView& x,
                      int64_t width) {
  std::optional<DType> common;
  for (const auto* parameter : parameters) {
    if (!*parameter) continue;
    (*parameter)->require_shape({width});
    if ((*parameter)->dtype() != DType::Float32) (*parameter)->require_dtype(x.dtype());
    if (common) (*parameter)->require_dtype(*common);
    common = (*parameter)->dtype();
  }
  return common.value_or(x.dtype());
}

// mean and rstd: [rows] floats in any shape; a mean is wanted unless rms.
void require_statistics(const std::optional<ArrayView>& mean, const ArrayView& rstd, int64_t rows, bool rms) {
  if (!rms && !mean) throw py::value_error("mean is needed unless rms=True");
  for (const ArrayView* view : {mean ? &*mean : nullptr, &rstd}) {
    if (view == nullptr) continue;
    view->require_dtype(DType::Float32);
    if (view->size() != rows) throw py::value_error("mean and rstd must have one element for each row of x");
  }
}

void layer_norm_forward(const py::object& x_array, const OptionalObject& weight_array,
                        const OptionalObject& bias_array, const py::object& y_array,
                        const OptionalObject& mean_array, const py::object& rstd_array, float eps, bool rms,
                        const std::optional<std::string>& isa_name) {
  const cpu::Isa isa = isa_or_active(isa_name);
  const ArrayView x(x_array, Access::Read, "x");
  const auto weight = optional_view(weight_array, Access::Read, "weight");
  const auto bias = optional_view(bias_array, Access::Read, "bias");
  const ArrayView y(y_array, Access::Write, "y");
  const auto mean = optional_view(mean_array, Access::Write, "mean");
  const ArrayView rstd(rstd_array, Access::Write, "rstd");
  const Rows sizes(x);
  require_like(y, x);
  require_statistics(mean, rstd, sizes.rows, rms);
  const LayerNormForward params = {
      .x = x.data(),
      .weight = data_or_null(weight),
      .bias = data_or_null(bias),
      .y = y.data(),
      .mean = floats(mean),
      .rstd = static_cast<float*>(rstd.data()),
      .rows = sizes.rows,
      .width = sizes.width,
      .eps = eps,
      .dtype = x.dtype(),
      .weight_dtype = parameter_dtype({&weight, &bias}, x, sizes.width),
      .rms = rms,
  };
  const py::gil_scoped_release unlocked;
  cpu::layer_norm_forward(params, isa, cpu::serial_for);
}

void layer_norm_backward(const py::object& dy_array, const py::object& x_array,
                         const OptionalObject& weight_array, const OptionalObject& mean_array,
                         const py::object& rstd_array, const py::object& dx_array,
                         const OptionalObject& dweight_array, const OptionalObject& dbias_array, bool rms,
                         const std::optional<std::string>& isa_name) {
  const cpu::Isa isa = isa_or_active(isa_name);
  const ArrayView dy(dy_array, Access::Read, "dy");
  const ArrayView x(x_array, Access::Read, "x");
  const auto weight = optional_view(weight_array, Access::Read, "weight");
  const auto mean = optional_view(mean_array, Access::Read, "mean");
  const ArrayView rstd(rstd_array, Access::Read, "rstd");
  const ArrayView dx(dx_array, Access::Write, "dx");
  const auto dweight = optional_view(dweight_array, Access::Write, "dweight");
  const auto dbias = optional_view(dbias_array, Access::Write, "dbias");
  const Rows sizes(x);
  require_like(dy, x);
  require_like(dx, x);
  require_statistics(mean, rstd, sizes.rows, rms);
  const LayerNormBackward params = {
      .dy = dy.data(),
      .x = x.data(),
      .weight = data_or_null(weight),
      .mean = floats(mean),
      .rstd = static_cast<const float*>(rstd.data()),
      .dx = dx.data(),
      .dweight = data_or_null(dweight),
      .dbias = data_or_null(dbias),
      .rows = sizes.rows,
      .width = sizes.width,
      .dtype = x.dtype(),
      .weight_dtype = parameter_dtype({&weight, &dweight, &dbias}, x, sizes.width),
      .rms = rms,
  };
  const py::gil_scoped_release unlocked;
  cpu::layer_norm_backward(params, isa, cpu::serial_for);
}

}  // namespace
}  // namespace evakernels

PYBIND11_MODULE(_C, m) {
  using namespace evakernels;
  m.doc() = "What was built, what this machine can run, and the launchers on raw buffers.";
  m.def("build_info", &build_info,
        "Version, compiler, instruction sets built and available, GPUs built for.");
  m.def(
      "active_isa", [] { return std::string(cpu::name(cpu::active_isa())); },
      "The instruction set in use: $EVAKERNELS_ISA, else the best; ValueError if that one is unavailable.");
  m.def("layer_norm_forward", &layer_norm_forward, "x"_a, "weight"_a.none(true), "bias"_a.none(true), "y"_a,
        "mean"_a.none(true), "rstd"_a, py::kw_only(), "eps"_a = 1e-6f, "rms"_a = false, "isa"_a = py::none(),
        R"(Writes y, mean and rstd of x [..., width], on the calling thread.

x and y: float32, bfloat16 (DLPack only) or float16, dense. weight, bias: [width] of x's dtype or float32,
or None. mean, rstd: float32, one element a row; mean may be None if rms.
isa: "baseline", "avx2", "avx512", or None for the active one.)");
  m.def("layer_norm_backward", &layer_norm_backward, "dy"_a, "x"_a, "weight"_a.none(true),
        "mean"_a.none(true), "rstd"_a, "dx"_a, "dweight"_a.none(true), "dbias"_a.none(true), py::kw_only(),
        "rms"_a = false, "isa"_a = py::none(),
        R"(Writes dx, and dweight and dbias unless None, on the calling thread.

Arrays as for layer_norm_forward; dweight and dbias: [width] of weight's dtype.)");
}
