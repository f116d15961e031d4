// The launchers of gelu on arrays.
#include "bind/python_launch.h"
#include "cpu/gelu.h"
#include "cuda/gelu.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace evakernels {
namespace {

void gelu_forward(const py::object& x_any, const py::object& bias_any, const py::object& out_any, bool tanh,
                  const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  const Array x = arrays.read(x_any, "x"), bias = arrays.read_if(bias_any, "bias"),
              out = arrays.write(out_any, "out");
  require_like(out, x);
  const RowSizes sizes(x);
  const GeluForward params = {
      .x = x.data,
      .bias = bias.data,
      .out = out.data,
      .rows = sizes.rows,
      .width = sizes.width,
      .dtype = x.dtype,
      .bias_dtype = parameter_dtype(x, {&bias}),
      .tanh = tanh,
  };
  launch<cpu::gelu_forward, cuda::gelu_forward>("gelu_forward", arrays, isa, params);
}

void gelu_backward(const py::object& dout_any, const py::object& x_any, const py::object& bias_any,
                   const py::object& dx_any, const py::object& dbias_any, bool tanh, const IsaName& isa,
                   uintptr_t stream) {
  Arrays arrays(stream);
  const Array dout = arrays.read(dout_any, "dout"), x = arrays.read(x_any, "x"),
              bias = arrays.read_if(bias_any, "bias"), dx = arrays.write(dx_any, "dx"),
              dbias = arrays.write_if(dbias_any, "dbias");
  require_like(dout, x);
  require_like(dx, x);
  require(!dbias || bias, "dbias without bias");
  if (dbias) require_like(dbias, bias);
  const RowSizes sizes(x);
  const GeluBackward params = {
      .dout = dout.data,
      .x = x.data,
      .bias = bias.data,
      .dx = dx.data,
      .dbias = dbias.data,
      .rows = sizes.rows,
      .width = sizes.width,
      .dtype = x.dtype,
      .bias_dtype = parameter_dtype(x, {&bias}),
      .tanh = tanh,
  };
  launch<cpu::gelu_backward, cuda::gelu_backward, cuda::gelu_backward_workspace>("gelu_backward", arrays, isa,
                                                                                 params);
}

}  // namespace

void register_gelu(py::module_& m) {
  m.def("gelu_forward", &gelu_forward, "x"_a, "bias"_a, "out"_a, py::kw_only(), "tanh"_a = false,
        "isa"_a = py::none(), "stream"_a = 0,
        "Writes out = gelu(x + bias). x: [..., F]; bias: [F] of x's dtype or float32, or None.");
  m.def("gelu_backward", &gelu_backward, "dout"_a, "x"_a, "bias"_a, "dx"_a, "dbias"_a, py::kw_only(),
        "tanh"_a = false, "isa"_a = py::none(), "stream"_a = 0,
        "Writes dx, and dbias unless None. Arrays as for gelu_forward.");
}

}  // namespace evakernels
