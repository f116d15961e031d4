// lamb as torch operators.
#include "bind/launch.h"
#include "cpu/lamb.h"
#include "cuda/lamb.h"

namespace evakernels {
namespace {

// The tensors of a list as dense buffers; a tensor that isn't dense is served by a copy.
class DenseList {
 public:
  DenseList(std::vector<Tensor> tensors, const char* name) : tensors_(std::move(tensors)) {
    for (const Tensor& tensor : tensors_) {
      dense_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
      dtypes_.push_back(dtype_of(tensor, name));
    }
  }

  size_t count() const { return dense_.size(); }
  int64_t size(size_t i) const { return dense_[i].numel(); }
  LambBuffer buffer(size_t i) const { return {dense_[i].mutable_data_ptr(), dtypes_[i]}; }

  // To be called when the buffers were written.
  void return_copies() {
    for (size_t i = 0; i < count(); ++i) {
      if (!tensors_[i].is_contiguous()) torch::stable::copy_(tensors_[i], dense_[i]);
    }
  }

 private:
  std::vector<Tensor> tensors_;
  std::vector<Tensor> dense_;
  std::vector<DType> dtypes_;
};

// As float32, on the device that it is on: the host doesn't wait for its value.
std::optional<Tensor> flag_of(const std::optional<Tensor>& flag) {
  if (!flag) return std::nullopt;
  require(flag->numel() == 1, "grad_scale and found_inf must have one element");
  return torch::stable::to(*flag, ScalarType::Float);
}

const float* value_of(const std::optional<Tensor>& flag) {
  return static_cast<const float*>(data_or_null(flag));
}

struct Lists {
  DenseList params, exp_avgs, exp_avg_sqs;
  const std::vector<Tensor>& steps;
  const std::vector<double>& weight_decays;
};

std::vector<LambTensor> tensors_of(const Lists& lists) {
  const size_t count = lists.params.count();
  require(lists.exp_avgs.count() == count && lists.exp_avg_sqs.count() == count &&
              lists.steps.size() == count && lists.weight_decays.size() == count,
          "the lists must be equally long");
  std::vector<LambTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = lists.params.size(i);
    require(lists.exp_avgs.size(i) == size && lists.exp_avg_sqs.size(i) == size,
            "the moments must have the shapes of the parameters");
    require(lists.steps[i].scalar_type() == ScalarType::Float && lists.steps[i].numel() == 1,
            "steps must be float32 of one element");
    tensors[i] = {
        .param = lists.params.buffer(i),
        .grad = {},
        .exp_avg = lists.exp_avgs.buffer(i),
        .exp_avg_sq = lists.exp_avg_sqs.buffer(i),
        .step = static_cast<float*>(lists.steps[i].mutable_data_ptr()),
        .size = size,
        .lr = 0.0,
        .weight_decay = lists.weight_decays[i],
    };
  }
  return tensors;
}

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
  std::vector<LambTensor> tensors = tensors_of(lists);
  require(gradients.count() == tensors.size(), "grads must be as many as params");
  for (size_t i = 0; i < tensors.size(); ++i) {
    require(gradients.size(i) == tensors[i].size, "grads must have the shapes of the parameters");
    tensors[i].grad = gradients.buffer(i);
  }
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
                std::optional<Tensor> found_inf) {
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
  std::vector<LambTensor> tensors = tensors_of(lists);
  require(lrs.size() == tensors.size(), "lrs must be as many as params");
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].lr = lrs[i];
  const Tensor squared_norms =
      torch::stable::contiguous(torch::stable::to(squared_norms_any, ScalarType::Float));
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

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("lamb_update", TORCH_BOX(&evakernels::lamb_update));
  m.impl("lamb_apply", TORCH_BOX(&evakernels::lamb_apply));
})
