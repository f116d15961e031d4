// lamb as torch operators.
#include "bind/launch.h"
#include "bind/tensor_lists.h"
#include "cpu/lamb.h"
#include "cuda/lamb.h"

namespace evakernels {
namespace {

LambOptions options_of(const std::vector<double>& betas_and_eps, bool nvlamb) {
  return {betas_and_eps.at(0), betas_and_eps.at(1), betas_and_eps.at(2), nvlamb};
}

Tensor lamb_update(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                   std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps,
                   std::vector<double> weight_decays, std::vector<double> betas_and_eps, bool nvlamb,
                   std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const Flag scale(grad_scale), skip(found_inf);
  StepTensors step({std::move(params), std::move(exp_avgs), std::move(exp_avg_sqs), steps, weight_decays});
  step.set_grads(std::move(grads));
  const Tensor squared_norms = new_float32(step.first(), {count_of(step.tensors()), 2});
  const auto norms = static_cast<float*>(squared_norms.mutable_data_ptr());
  launch<cpu::lamb_update, cuda::lamb_update>(
      "lamb_update", step.first(),
      lamb_update_params(step.tensors(), options_of(betas_and_eps, nvlamb), norms,
                         {scale.value(), skip.value()}));
  step.return_moments();
  return squared_norms;
}

void lamb_apply(std::vector<Tensor> params, std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                std::vector<Tensor> steps, const Tensor& squared_norms_any, std::vector<double> lrs,
                std::vector<double> weight_decays, std::vector<double> betas_and_eps, bool nvlamb,
                std::optional<Tensor> found_inf, Numbers seeds, Numbers first_elements) {
  const Flag skip(found_inf);
  StepTensors step({std::move(params), std::move(exp_avgs), std::move(exp_avg_sqs), steps, weight_decays});
  set_lrs(step.tensors(), lrs);
  set_rounding(step.tensors(), seeds, first_elements);
  const Tensor squared_norms = as_contiguous(torch::stable::to(squared_norms_any, ScalarType::Float));
  require(squared_norms.numel() == 2 * count_of(step.tensors()), "squared_norms must be [n, 2]");
  const auto norms = static_cast<const float*>(squared_norms.const_data_ptr());
  launch<cpu::lamb_apply, cuda::lamb_apply>(
      "lamb_apply", step.first(),
      lamb_apply_params(step.tensors(), options_of(betas_and_eps, nvlamb), norms, skip.value()));
  step.return_params();
}

void lamb_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
               std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<double> lrs,
               std::vector<double> weight_decays, std::vector<double> betas_and_eps, bool nvlamb,
               std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, Numbers seeds,
               Numbers first_elements) {
  const Flag scale(grad_scale), skip(found_inf);
  StepTensors step({std::move(params), std::move(exp_avgs), std::move(exp_avg_sqs), steps, weight_decays});
  step.set_grads(std::move(grads));
  set_lrs(step.tensors(), lrs);
  set_rounding(step.tensors(), seeds, first_elements);
  launch<cpu::lamb_step, cuda::lamb_step>(
      "lamb_step", step.first(),
      lamb_step_params(step.tensors(), options_of(betas_and_eps, nvlamb), {scale.value(), skip.value()}));
  step.return_params();
  step.return_moments();
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("lamb_update", TORCH_BOX(&evakernels::lamb_update));
  m.impl("lamb_apply", TORCH_BOX(&evakernels::lamb_apply));
  m.impl("lamb_step", TORCH_BOX(&evakernels::lamb_step));
})
