// The launchers of layer_norm on arrays.
#include "bind/layer_norm.h"
#include "bind/python_launch.h"
#include "cpu/layer_norm.h"
#include "cuda/layer_norm.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace evakernels {
namespace {

void layer_norm_forward(const py::object& x, const py::object& weight, const py::object& bias,
                        const py::object& y, const py::object& mean, const py::object& rstd, double eps,
                        bool rms, const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  const LayerNormForward params = layer_norm_forward_params(
      arrays.read(x, "x"), arrays.read_if(weight, "weight"), arrays.read_if(bias, "bias"),
      arrays.write(y, "y"), arrays.write_if(mean, "mean"), arrays.write(rstd, "rstd"), eps, rms);
  launch<cpu::layer_norm_forward, cuda::layer_norm_forward>("layer_norm_forward", arrays, isa, params);
}

void layer_norm_backward(const py::object& dy, const py::object& x, const py::object& weight,
                         const py::object& mean, const py::object& rstd, const py::object& dx,
                         const py::object& dweight, const py::object& dbias, bool rms, const IsaName& isa,
                         uintptr_t stream) {
  Arrays arrays(stream);
  const LayerNormBackward params = layer_norm_backward_params(
      arrays.read(dy, "dy"), arrays.read(x, "x"), arrays.read_if(weight, "weight"),
      arrays.read_if(mean, "mean"), arrays.read(rstd, "rstd"), arrays.write(dx, "dx"),
      arrays.write_if(dweight, "dweight"), arrays.write_if(dbias, "dbias"), rms);
  launch<cpu::layer_norm_backward, cuda::layer_norm_backward>("layer_norm_backward", arrays, isa, params);
}

}  // namespace

void register_layer_norm(py::module_& m) {
  m.def("layer_norm_forward", &layer_norm_forward, "x"_a, "weight"_a, "bias"_a, "y"_a, "mean"_a, "rstd"_a,
        py::kw_only(), "eps"_a = 1e-6, "rms"_a = false, "isa"_a = py::none(), "stream"_a = 0,
        R"(Writes y, mean and rstd of x [..., width].

y: of x's dtype, or 16 bits beside float32, either way. weight, bias: [width] of x's or y's dtype or float32, or
None. mean, rstd: float32, one element a row; mean may be None if rms.)");
  m.def("layer_norm_backward", &layer_norm_backward, "dy"_a, "x"_a, "weight"_a, "mean"_a, "rstd"_a, "dx"_a,
        "dweight"_a, "dbias"_a, py::kw_only(), "rms"_a = false, "isa"_a = py::none(), "stream"_a = 0,
        R"(Writes dx, and dweight and dbias unless None.

Arrays as for layer_norm_forward; dweight and dbias: [width] of weight's dtype.)");
}

}  // namespace evakernels
