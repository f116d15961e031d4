// The launchers of swiglu on arrays.
#include "bind/python_launch.h"
#include "bind/swiglu.h"
#include "cpu/swiglu.h"
#include "cuda/swiglu.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace evakernels {
namespace {

void swiglu_forward(const py::object& gate, const py::object& up, const py::object& norm_weight,
                    const py::object& norm_bias, const py::object& out, const py::object& mean,
                    const py::object& rstd, double eps, const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  const SwigluForward params = swiglu_forward_params(
      arrays.read_strided(gate, "gate"), arrays.read_strided(up, "up"),
      arrays.read_if(norm_weight, "norm_weight"), arrays.read_if(norm_bias, "norm_bias"),
      arrays.write(out, "out"), arrays.write_if(mean, "mean"), arrays.write_if(rstd, "rstd"), eps);
  launch<cpu::swiglu_forward, cuda::swiglu_forward>("swiglu_forward", arrays, isa, params);
}

void swiglu_backward(const py::object& dout, const py::object& gate, const py::object& up,
                     const py::object& norm_weight, const py::object& mean, const py::object& rstd,
                     const py::object& dgate, const py::object& dup, const py::object& dweight,
                     const py::object& dbias, const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  const SwigluBackward params = swiglu_backward_params(
      arrays.read(dout, "dout"), arrays.read_strided(gate, "gate"), arrays.read_strided(up, "up"),
      arrays.read_if(norm_weight, "norm_weight"), arrays.read_if(mean, "mean"), arrays.read_if(rstd, "rstd"),
      arrays.write(dgate, "dgate"), arrays.write(dup, "dup"), arrays.write_if(dweight, "dweight"),
      arrays.write_if(dbias, "dbias"));
  launch<cpu::swiglu_backward, cuda::swiglu_backward>("swiglu_backward", arrays, isa, params);
}

}  // namespace

void register_swiglu(py::module_& m) {
  m.def("swiglu_forward", &swiglu_forward, "gate"_a, "up"_a, "norm_weight"_a, "norm_bias"_a, "out"_a,
        "mean"_a, "rstd"_a, py::kw_only(), "eps"_a = 1e-6, "isa"_a = py::none(), "stream"_a = 0,
        R"(Writes out = silu(gate) * up, normalised if there is a norm_weight.

gate, up: [..., F], rows dense and equally far apart, as halves of a packed projection are. norm_weight,
norm_bias: [F] of gate's dtype or float32, or None. mean, rstd: float32, one element a row; None without a
norm.)");
  m.def("swiglu_backward", &swiglu_backward, "dout"_a, "gate"_a, "up"_a, "norm_weight"_a, "mean"_a, "rstd"_a,
        "dgate"_a, "dup"_a, "dweight"_a, "dbias"_a, py::kw_only(), "isa"_a = py::none(), "stream"_a = 0,
        R"(Writes dgate and dup, and dweight and dbias unless None.

Arrays as for swiglu_forward; dgate and dup are dense, dweight and dbias of norm_weight's dtype.)");
}

}  // namespace evakernels
