// adamw as a torch operator.
#include "bind/launch.h"
#include "bind/tensor_lists.h"
#include "cpu/adamw.h"
#include "cuda/adamw.h"

namespace evakernels {
namespace {

void adamw_update(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                  std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<double> lrs,
                  std::vector<double> weight_decays, double beta1, double beta2, double eps,
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
  const AdamwUpdate update = {
      .tensors = tensors.data(),
      .count = static_cast<int64_t>(tensors.size()),
      .beta1 = beta1,
      .beta2 = beta2,
      .eps = eps,
      .grad_scale = value_of(scale),
      .found_inf = value_of(skip),
  };
  launch<cpu::adamw_update, cuda::adamw_update, cuda::adamw_update_workspace>("adamw_update", like, update);
  lists.params.return_copies();
  lists.exp_avgs.return_copies();
  lists.exp_avg_sqs.return_copies();
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, { m.impl("adamw_update", TORCH_BOX(&evakernels::adamw_update)); })
