// The launchers of the norms with a residual connection on arrays.
#include "bind/python_launch.h"
#include "bind/residual_norm.h"
#include "cpu/residual_norm.h"
#include "cuda/residual_norm.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace evakernels {
namespace {

ResidualNormArrays parameters_of(Arrays& arrays, const py::object& weight, const py::object& bias,
                                 const py::object& layer_scale, const py::object& row_scale) {
  return {arrays.read_if(weight, "weight"), arrays.read_if(bias, "bias"),
          arrays.read_if(layer_scale, "layer_scale"), arrays.read_if(row_scale, "row_scale")};
}

ResidualNormGradientArrays gradients_of(Arrays& arrays, const py::object& dweight, const py::object& dbias,
                                        const py::object& dlayer_scale) {
  return {arrays.write_if(dweight, "dweight"), arrays.write_if(dbias, "dbias"),
          arrays.write_if(dlayer_scale, "dlayer_scale")};
}

void add_layer_norm_forward(const py::object& residual, const py::object& branch, const py::object& weight,
                            const py::object& bias, const py::object& layer_scale,
                            const py::object& row_scale, const py::object& y, const py::object& x,
                            const py::object& mean, const py::object& rstd, double eps, bool rms,
                            const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  const AddNormForward params = add_norm_forward_params(
      arrays.read(residual, "residual"), arrays.read(branch, "branch"),
      parameters_of(arrays, weight, bias, layer_scale, row_scale), arrays.write(y, "y"), arrays.write(x, "x"),
      arrays.write_if(mean, "mean"), arrays.write(rstd, "rstd"), eps, rms);
  launch<cpu::add_norm_forward, cuda::add_norm_forward>("add_layer_norm_forward", arrays, isa, params);
}

void add_layer_norm_backward(const py::object& dy, const py::object& dx, const py::object& x,
                             const py::object& branch, const py::object& weight,
                             const py::object& layer_scale, const py::object& row_scale,
                             const py::object& mean, const py::object& rstd, const py::object& dresidual,
                             const py::object& dbranch, const py::object& dweight, const py::object& dbias,
                             const py::object& dlayer_scale, bool rms, const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  const AddNormBackward params = add_norm_backward_params(
      arrays.read(dy, "dy"), arrays.read(dx, "dx"), arrays.read(x, "x"), arrays.read(branch, "branch"),
      parameters_of(arrays, weight, py::none(), layer_scale, row_scale), arrays.read_if(mean, "mean"),
      arrays.read(rstd, "rstd"), arrays.write(dresidual, "dresidual"), arrays.write_if(dbranch, "dbranch"),
      gradients_of(arrays, dweight, dbias, dlayer_scale), rms);
  launch<cpu::add_norm_backward, cuda::add_norm_backward>("add_layer_norm_backward", arrays, isa, params);
}

void layer_norm_add_forward(const py::object& residual, const py::object& branch, const py::object& weight,
                            const py::object& bias, const py::object& layer_scale,
                            const py::object& row_scale, const py::object& x, const py::object& mean,
                            const py::object& rstd, double eps, bool rms, const IsaName& isa,
                            uintptr_t stream) {
  Arrays arrays(stream);
  const NormAddForward params = norm_add_forward_params(
      arrays.read(residual, "residual"), arrays.read(branch, "branch"),
      parameters_of(arrays, weight, bias, layer_scale, row_scale), arrays.write(x, "x"),
      arrays.write_if(mean, "mean"), arrays.write(rstd, "rstd"), eps, rms);
  launch<cpu::norm_add_forward, cuda::norm_add_forward>("layer_norm_add_forward", arrays, isa, params);
}

void layer_norm_add_backward(const py::object& dx, const py::object& branch, const py::object& weight,
                             const py::object& bias, const py::object& layer_scale,
                             const py::object& row_scale, const py::object& mean, const py::object& rstd,
                             const py::object& dbranch, const py::object& dweight, const py::object& dbias,
                             const py::object& dlayer_scale, bool rms, const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  const NormAddBackward params = norm_add_backward_params(
      arrays.read(dx, "dx"), arrays.read(branch, "branch"),
      parameters_of(arrays, weight, bias, layer_scale, row_scale), arrays.read_if(mean, "mean"),
      arrays.read(rstd, "rstd"), arrays.write(dbranch, "dbranch"),
      gradients_of(arrays, dweight, dbias, dlayer_scale), rms);
  launch<cpu::norm_add_backward, cuda::norm_add_backward>("layer_norm_add_backward", arrays, isa, params);
}

}  // namespace

void register_residual_norm(py::module_& m) {
  m.def("add_layer_norm_forward", &add_layer_norm_forward, "residual"_a, "branch"_a, "weight"_a, "bias"_a,
        "layer_scale"_a, "row_scale"_a, "y"_a, "x"_a, "mean"_a, "rstd"_a, py::kw_only(), "eps"_a = 1e-6,
        "rms"_a = false, "isa"_a = py::none(), "stream"_a = 0,
        R"(Writes x = residual + layer_scale * row_scale * branch, y = norm(x), and mean and rstd of x's rows.

residual, branch: [B, ..., C], of any two dtypes on a CPU, on a GPU of one or residual in float32. x: of residual's
dtype, as y, which beside a float32 residual may be of branch's. weight, bias, layer_scale: [C]; row_scale: [B]; each
of any dtype or None. mean, rstd: as for layer_norm_forward.)");
  m.def("add_layer_norm_backward", &add_layer_norm_backward, "dy"_a, "dx"_a, "x"_a, "branch"_a, "weight"_a,
        "layer_scale"_a, "row_scale"_a, "mean"_a, "rstd"_a, "dresidual"_a, "dbranch"_a, "dweight"_a,
        "dbias"_a, "dlayer_scale"_a, py::kw_only(), "rms"_a = false, "isa"_a = py::none(), "stream"_a = 0,
        R"(Writes dresidual, and dbranch, dweight, dbias and dlayer_scale unless None.

dx: the gradient that reaches x beside that of the norm. branch: read only for dlayer_scale.)");
  m.def("layer_norm_add_forward", &layer_norm_add_forward, "residual"_a, "branch"_a, "weight"_a, "bias"_a,
        "layer_scale"_a, "row_scale"_a, "x"_a, "mean"_a, "rstd"_a, py::kw_only(), "eps"_a = 1e-6,
        "rms"_a = false, "isa"_a = py::none(), "stream"_a = 0,
        R"(Writes x = residual + layer_scale * row_scale * norm(branch), and mean and rstd of branch's rows.

Arrays as for add_layer_norm_forward.)");
  m.def("layer_norm_add_backward", &layer_norm_add_backward, "dx"_a, "branch"_a, "weight"_a, "bias"_a,
        "layer_scale"_a, "row_scale"_a, "mean"_a, "rstd"_a, "dbranch"_a, "dweight"_a, "dbias"_a,
        "dlayer_scale"_a, py::kw_only(), "rms"_a = false, "isa"_a = py::none(), "stream"_a = 0,
        "Writes dbranch, and dweight, dbias and dlayer_scale unless None. The residual's gradient is dx.");
}

}  // namespace evakernels
