// The launchers of adamw and gradient_norm on arrays.
#include "bind/python_launch.h"
#include "bind/python_lists.h"
#include "cpu/adamw.h"
#include "cuda/adamw.h"
#include "cuda/gradient_norm.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace evakernels {
namespace {

void adamw_update(const List& params, const List& grads, const List& exp_avgs, const List& exp_avg_sqs,
                  const List& steps, const std::vector<double>& lrs, const std::vector<double>& weight_decays,
                  double beta1, double beta2, double eps, const py::object& grad_scale,
                  const py::object& found_inf, const Numbers& seeds, const Numbers& first_elements,
                  const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  OptimizedTensors tensors = tensors_of(arrays, {params, exp_avgs, exp_avg_sqs, steps, weight_decays});
  set_grads(tensors, arrays, grads);
  set_lrs(tensors, lrs);
  set_rounding(tensors, seeds, first_elements);
  launch<cpu::adamw_update, cuda::adamw_update>(
      "adamw_update", arrays, isa,
      adamw_update_params(tensors, beta1, beta2, eps, flags_of(arrays, grad_scale, found_inf)));
}

void gradient_norm(const List& grads, const py::object& norm, uintptr_t stream) {
  Arrays arrays(stream);
  OptimizedTensors tensors(grads.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Array grad = arrays.read(grads[i], "grads");
    tensors[i].size = product(grad.sizes);
    tensors[i].grad = {grad.data, grad.dtype};
  }
  launch_on_gpu<cuda::gradient_norm>("gradient_norm", arrays,
                                     gradient_norm_params(tensors, one_float(arrays.write(norm, "norm"))));
}

}  // namespace

void register_adamw(py::module_& m) {
  m.def("adamw_update", &adamw_update, "params"_a, "grads"_a, "exp_avgs"_a, "exp_avg_sqs"_a, "steps"_a,
        "lrs"_a, "weight_decays"_a, py::kw_only(), "beta1"_a, "beta2"_a, "eps"_a, "grad_scale"_a = py::none(),
        "found_inf"_a = py::none(), "seeds"_a = Numbers{}, "first_elements"_a = Numbers{},
        "isa"_a = py::none(), "stream"_a = 0, "Takes a step in place. Arrays as for lamb_update.");
  m.def("gradient_norm", &gradient_norm, "grads"_a, "norm"_a, py::kw_only(), "stream"_a = 0,
        "Writes the norm of a list of dense arrays, float32 of one element. On a GPU only.");
}

}  // namespace evakernels
