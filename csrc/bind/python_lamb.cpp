// The launchers of lamb on arrays.
#include "bind/python_launch.h"
#include "bind/python_lists.h"
#include "cpu/lamb.h"
#include "cuda/lamb.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace evakernels {
namespace {

float* norms_of(const Array& array, size_t count) {
  require_dtype(array, DType::Float32);
  require_sizes(array, {static_cast<int64_t>(count), 2});
  return array.floats();
}

void lamb_update(const List& params, const List& grads, const List& exp_avgs, const List& exp_avg_sqs,
                 const List& steps, const std::vector<double>& weight_decays, const py::object& squared_norms,
                 double beta1, double beta2, double eps, bool nvlamb, const py::object& grad_scale,
                 const py::object& found_inf, const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  OptimizedTensors tensors = tensors_of(arrays, {params, exp_avgs, exp_avg_sqs, steps, weight_decays});
  set_grads(tensors, arrays, grads);
  float* const norms = norms_of(arrays.write(squared_norms, "squared_norms"), tensors.size());
  launch<cpu::lamb_update, cuda::lamb_update>("lamb_update", arrays, isa,
                                              lamb_update_params(tensors, {beta1, beta2, eps, nvlamb}, norms,
                                                                 flags_of(arrays, grad_scale, found_inf)));
}

void lamb_apply(const List& params, const List& exp_avgs, const List& exp_avg_sqs, const List& steps,
                const py::object& squared_norms, const std::vector<double>& lrs,
                const std::vector<double>& weight_decays, double beta1, double beta2, double eps, bool nvlamb,
                const py::object& found_inf, const Numbers& seeds, const Numbers& first_elements,
                const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  OptimizedTensors tensors = tensors_of(arrays, {params, exp_avgs, exp_avg_sqs, steps, weight_decays});
  set_lrs(tensors, lrs);
  set_rounding(tensors, seeds, first_elements);
  const float* const norms = norms_of(arrays.read(squared_norms, "squared_norms"), tensors.size());
  launch<cpu::lamb_apply, cuda::lamb_apply>(
      "lamb_apply", arrays, isa,
      lamb_apply_params(tensors, {beta1, beta2, eps, nvlamb}, norms,
                        one_float(arrays.read_if(found_inf, "found_inf"))));
}

void lamb_step(const List& params, const List& grads, const List& exp_avgs, const List& exp_avg_sqs,
               const List& steps, const std::vector<double>& lrs, const std::vector<double>& weight_decays,
               double beta1, double beta2, double eps, bool nvlamb, const py::object& grad_scale,
               const py::object& found_inf, const Numbers& seeds, const Numbers& first_elements,
               const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  OptimizedTensors tensors = tensors_of(arrays, {params, exp_avgs, exp_avg_sqs, steps, weight_decays});
  set_grads(tensors, arrays, grads);
  set_lrs(tensors, lrs);
  set_rounding(tensors, seeds, first_elements);
  launch<cpu::lamb_step, cuda::lamb_step>(
      "lamb_step", arrays, isa,
      lamb_step_params(tensors, {beta1, beta2, eps, nvlamb}, flags_of(arrays, grad_scale, found_inf)));
}

}  // namespace

void register_lamb(py::module_& m) {
  m.def(
      "lamb_update", &lamb_update, "params"_a, "grads"_a, "exp_avgs"_a, "exp_avg_sqs"_a, "steps"_a,
      "weight_decays"_a, "squared_norms"_a, py::kw_only(), "beta1"_a, "beta2"_a, "eps"_a, "nvlamb"_a = false,
      "grad_scale"_a = py::none(), "found_inf"_a = py::none(), "isa"_a = py::none(), "stream"_a = 0,
      R"(Advances the moments and steps in place and writes squared_norms [n, 2], of parameters and directions.

Lists of n arrays, dense, of any dtypes and shapes; steps: float32 of one element. grad_scale, found_inf:
float32 of one element, or None.)");
  m.def(
      "lamb_apply", &lamb_apply, "params"_a, "exp_avgs"_a, "exp_avg_sqs"_a, "steps"_a, "squared_norms"_a,
      "lrs"_a, "weight_decays"_a, py::kw_only(), "beta1"_a, "beta2"_a, "eps"_a, "nvlamb"_a = false,
      "found_inf"_a = py::none(), "seeds"_a = Numbers{}, "first_elements"_a = Numbers{}, "isa"_a = py::none(),
      "stream"_a = 0,
      "Takes the step of the parameters in place. Arrays as for lamb_update, whose squared_norms it reads.");
  m.def("lamb_step", &lamb_step, "params"_a, "grads"_a, "exp_avgs"_a, "exp_avg_sqs"_a, "steps"_a, "lrs"_a,
        "weight_decays"_a, py::kw_only(), "beta1"_a, "beta2"_a, "eps"_a, "nvlamb"_a = false,
        "grad_scale"_a = py::none(), "found_inf"_a = py::none(), "seeds"_a = Numbers{},
        "first_elements"_a = Numbers{}, "isa"_a = py::none(), "stream"_a = 0,
        "lamb_update and lamb_apply in one. Arrays as for these.");
}

}  // namespace evakernels
