// lamb as torch operators.
#include "bind/launch.h"
#include "bind/tensor_lists.h"
#include "cpu/lamb.h"
#include "cuda/lamb.h"

namespace evakernels {
namespace {

Tensor lamb_update(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                   std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps,
                   std::vector<double> weight_decays, double beta1, double beta2, double eps, bool nvlamb,
                   std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  require(!params.empty(), "params is empty");
  const Tensor like = params[0];
  const Tensor squared_norms = new_float32(like, {static_cast<int64_t>(params.size()), 2});
  const auto scale = flag_of(grad_scale), skip = flag_of(found_inf);
  Lists lists = {
      {std::move(params), "params"},
      {std::move(exp_avgs), "exp_avgs"},
      {std::move(exp_avg_sqs), "exp_avg_sqs"},
      steps,
      weight_decays,
  };
  const DenseList gradients(std::move(grads), "grads");
  std::vector<OptimizedTensor> tensors = tensors_of(lists);
  set_grads(tensors, gradients);
  const LambUpdate update = {
      .tensors = tensors.data(),
      .count = static_cast<int64_t>(tensors.size()),
      .options = {beta1, beta2, eps, nvlamb},
      .squared_norms = static_cast<float*>(squared_norms.mutable_data_ptr()),
      .grad_scale = value_of(scale),
      .found_inf = value_of(skip),
  };
  launch<cpu::lamb_update, cuda::lamb_update, cuda::lamb_update_workspace>("lamb_update", like, update);
  lists.exp_avgs.return_copies();
  lists.exp_avg_sqs.return_copies();
  return squared_norms;
}

void lamb_apply(std::vector<Tensor> params, std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                std::vector<Tensor> steps, const Tensor& squared_norms_any, std::vector<double> lrs,
                std::vector<double> weight_decays, double beta1, double beta2, double eps, bool nvlamb,
                std::optional<Tensor> found_inf, Numbers seeds, Numbers first_elements) {
  require(!params.empty(), "params is empty");
  const Tensor like = params[0];
  const auto skip = flag_of(found_inf);
  Lists lists = {
      {std::move(params), "params"},
      {std::move(exp_avgs), "exp_avgs"},
      {std::move(exp_avg_sqs), "exp_avg_sqs"},
      steps,
      weight_decays,
  };
  std::vector<OptimizedTensor> tensors = tensors_of(lists);
  set_lrs(tensors, lrs);
  set_rounding(tensors, seeds, first_elements);
  const Tensor squared_norms = as_contiguous(torch::stable::to(squared_norms_any, ScalarType::Float));
  require(squared_norms.numel() == 2 * static_cast<int64_t>(tensors.size()), "squared_norms must be [n, 2]");
  const LambApply apply = {
      .tensors = tensors.data(),
      .count = static_cast<int64_t>(tensors.size()),
      .options = {beta1, beta2, eps, nvlamb},
      .squared_norms = static_cast<const float*>(squared_norms.const_data_ptr()),
      .found_inf = value_of(skip),
  };
  launch<cpu::lamb_apply, cuda::lamb_apply, cuda::lamb_apply_workspace>("lamb_apply", like, apply);
  lists.params.return_copies();
}

void lamb_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
               std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<double> lrs,
               std::vector<double> weight_decays, double beta1, double beta2, double eps, bool nvlamb,
               std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, Numbers seeds,
               Numbers first_elements) {
  require(!params.empty(), "params is empty");
  const Tensor like = params[0];
  const auto scale = flag_of(grad_scale), skip = flag_of(found_inf);
  Lists lists = {
      {std::move(params), "params"},
      {std::move(exp_avgs), "exp_avgs"},
      {std::move(exp_avg_sqs), "exp_avg_sqs"},
      steps,
      weight_decays,
  };
  const DenseList gradients(std::move(grads), "grads");
  std::vector<OptimizedTensor> tensors = tensors_of(lists);
  set_grads(tensors, gradients);
  set_lrs(tensors, lrs);
  set_rounding(tensors, seeds, first_elements);
  const LambStep step = {
      .tensors = tensors.data(),
      .count = static_cast<int64_t>(tensors.size()),
      .options = {beta1, beta2, eps, nvlamb},
      .grad_scale = value_of(scale),
      .found_inf = value_of(skip),
  };
  launch<cpu::lamb_step, cuda::lamb_step, cuda::lamb_step_workspace>("lamb_step", like, step);
  lists.params.return_copies();
  lists.exp_avgs.return_copies();
  lists.exp_avg_sqs.return_copies();
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("lamb_update", TORCH_BOX(&evakernels::lamb_update));
  m.impl("lamb_apply", TORCH_BOX(&evakernels::lamb_apply));
  m.impl("lamb_step", TORCH_BOX(&evakernels::lamb_step));
})
