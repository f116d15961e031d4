// What the bindings of the optimizers share: lists of tensors as arrays of OptimizedTensor, and flags.
#pragma once

#include <utility>

#include "bind/optimizer_numbers.h"
#include "bind/torch_arguments.h"
#include "common/optimizer.h"

namespace evakernels {

// The tensors of a list as dense buffers; a tensor that isn't dense is served by a copy.
class DenseList {
 public:
  DenseList(std::vector<Tensor> tensors, const char* name) : tensors_(std::move(tensors)) {
    for (const Tensor& tensor : tensors_) {
      dense_.push_back(as_contiguous(tensor));
      dtypes_.push_back(dtype_of(tensor, name));
    }
  }

  size_t count() const { return dense_.size(); }
  int64_t size(size_t i) const { return dense_[i].numel(); }
  TensorBuffer buffer(size_t i) const { return {dense_[i].mutable_data_ptr(), dtypes_[i]}; }

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
inline std::optional<Tensor> flag_of(const std::optional<Tensor>& flag) {
  if (!flag) return std::nullopt;
  require(flag->numel() == 1, "grad_scale and found_inf must have one element");
  return torch::stable::to(*flag, ScalarType::Float);
}

inline const float* value_of(const std::optional<Tensor>& flag) {
  return static_cast<const float*>(data_or_null(flag));
}

struct Lists {
  DenseList params, exp_avgs, exp_avg_sqs;
  const std::vector<Tensor>& steps;
  const std::vector<double>& weight_decays;
};

inline std::vector<OptimizedTensor> tensors_of(const Lists& lists) {
  const size_t count = lists.params.count();
  require(lists.exp_avgs.count() == count && lists.exp_avg_sqs.count() == count &&
              lists.steps.size() == count && lists.weight_decays.size() == count,
          "the lists must be equally long");
  std::vector<OptimizedTensor> tensors(count);
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
        .rounding = {kNearest, 0},
    };
  }
  return tensors;
}

inline void set_grads(std::vector<OptimizedTensor>& tensors, const DenseList& grads) {
  require(grads.count() == tensors.size(), "grads must be as many as params");
  for (size_t i = 0; i < tensors.size(); ++i) {
    require(grads.size(i) == tensors[i].size, "grads must have the shapes of the parameters");
    tensors[i].grad = grads.buffer(i);
  }
}

}  // namespace evakernels
