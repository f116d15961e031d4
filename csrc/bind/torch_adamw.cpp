// adamw as a torch operator.
#include "bind/launch.h"
#include "bind/tensor_lists.h"
#include "cpu/adamw.h"
#include "cuda/adamw.h"

namespace evakernels {
namespace {

void adamw_update(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                  std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<double> lrs,
                  std::vector<double> weight_decays, std::vector<double> betas_and_eps,
                  std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, Numbers seeds,
                  Numbers first_elements) {
  const Flag scale(grad_scale), skip(found_inf);
  StepTensors step({std::move(params), std::move(exp_avgs), std::move(exp_avg_sqs), steps, weight_decays});
  step.set_grads(std::move(grads));
  set_lrs(step.tensors(), lrs);
  set_rounding(step.tensors(), seeds, first_elements);
  launch<cpu::adamw_update, cuda::adamw_update>(
      "adamw_update", step.first(),
      adamw_update_params(step.tensors(), betas_and_eps.at(0), betas_and_eps.at(1), betas_and_eps.at(2),
                          {scale.value(), skip.value()}));
  step.return_params();
  step.return_moments();
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, { m.impl("adamw_update", TORCH_BOX(&evakernels::adamw_update)); })
