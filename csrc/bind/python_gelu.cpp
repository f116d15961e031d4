// The launchers of gelu on arrays.
#include "bind/gelu.h"
#include "bind/python_launch.h"
#include "cpu/gelu.h"
#include "cuda/gelu.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace evakernels {
namespace {

GeluForm gelu_form(const std::string& approximate) {
  if (approximate == "none") return GeluForm::Exact;
  if (approximate == "tanh") return GeluForm::Tanh;
  require(approximate == "sigmoid",
          "approximate is '" + approximate + "'; accepted: 'none', 'tanh', 'sigmoid'");
  return GeluForm::Sigmoid;
}

void gelu_forward(const py::object& x, const py::object& bias, const py::object& out,
                  const std::string& approximate, const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  const GeluForward params = gelu_forward_params(arrays.read(x, "x"), arrays.read_if(bias, "bias"),
                                                 arrays.write(out, "out"), gelu_form(approximate));
  launch<cpu::gelu_forward, cuda::gelu_forward>("gelu_forward", arrays, isa, params);
}

void gelu_backward(const py::object& dout, const py::object& x, const py::object& bias, const py::object& dx,
                   const py::object& dbias, const std::string& approximate, const IsaName& isa,
                   uintptr_t stream) {
  Arrays arrays(stream);
  const GeluBackward params =
      gelu_backward_params(arrays.read(dout, "dout"), arrays.read(x, "x"), arrays.read_if(bias, "bias"),
                           arrays.write(dx, "dx"), arrays.write_if(dbias, "dbias"), gelu_form(approximate));
  launch<cpu::gelu_backward, cuda::gelu_backward>("gelu_backward", arrays, isa, params);
}

}  // namespace

void register_gelu(py::module_& m) {
  m.def("gelu_forward", &gelu_forward, "x"_a, "bias"_a, "out"_a, py::kw_only(), "approximate"_a = "none",
        "isa"_a = py::none(), "stream"_a = 0,
        "Writes out = gelu(x + bias). x: [..., F]; bias: [F] of x's dtype or float32, or None; "
        "approximate: none, tanh or sigmoid.");
  m.def("gelu_backward", &gelu_backward, "dout"_a, "x"_a, "bias"_a, "dx"_a, "dbias"_a, py::kw_only(),
        "approximate"_a = "none", "isa"_a = py::none(), "stream"_a = 0,
        "Writes dx, and dbias unless None. Arrays as for gelu_forward.");
}

}  // namespace evakernels
