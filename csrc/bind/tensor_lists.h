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
  const Tensor& first() const { return tensors_.front(); }
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

// grad_scale or found_inf as float32, on the device that it is on: the host doesn't wait for its value.
class Flag {
 public:
  explicit Flag(const std::optional<Tensor>& flag) {
    require(!flag || flag->numel() == 1, "grad_scale and found_inf must have one element");
    if (flag) value_ = torch::stable::to(*flag, ScalarType::Float);
  }

  const float* value() const { return static_cast<const float*>(data_or_null(value_)); }

 private:
  std::optional<Tensor> value_;
};

// The lists that each optimizer is given.
struct TensorLists {
  std::vector<Tensor> params, exp_avgs, exp_avg_sqs;
  const std::vector<Tensor>& steps;
  const std::vector<double>& weight_decays;
};

// Their dense buffers as params take them; what is set later is missing.
class StepTensors {
 public:
  explicit StepTensors(TensorLists lists)
      : params_(std::move(lists.params), "params"),
        exp_avgs_(std::move(lists.exp_avgs), "exp_avgs"),
        exp_avg_sqs_(std::move(lists.exp_avg_sqs), "exp_avg_sqs"),
        tensors_(params_.count()) {
    const size_t count = params_.count();
    require(count > 0, "params is empty");
    require(exp_avgs_.count() == count && exp_avg_sqs_.count() == count && lists.steps.size() == count &&
                lists.weight_decays.size() == count,
            "the lists must be equally long");
    for (size_t i = 0; i < count; ++i) {
      const int64_t size = params_.size(i);
      require(exp_avgs_.size(i) == size && exp_avg_sqs_.size(i) == size,
              "the moments must have the shapes of the parameters");
      const Tensor& step = lists.steps[i];
      require(step.scalar_type() == ScalarType::Float && step.numel() == 1,
              "steps must be float32 of one element");
      tensors_[i].param = params_.buffer(i);
      tensors_[i].exp_avg = exp_avgs_.buffer(i);
      tensors_[i].exp_avg_sq = exp_avg_sqs_.buffer(i);
      tensors_[i].step = static_cast<float*>(step.mutable_data_ptr());
      tensors_[i].size = size;
      tensors_[i].weight_decay = lists.weight_decays[i];
    }
  }

  void set_grads(std::vector<Tensor> grads) {
    require(grads.size() == tensors_.size(), "grads must be as many as params");
    grads_.emplace(std::move(grads), "grads");
    for (size_t i = 0; i < tensors_.size(); ++i) {
      require(grads_->size(i) == tensors_[i].size, "grads must have the shapes of the parameters");
      tensors_[i].grad = grads_->buffer(i);
    }
  }

  OptimizedTensors& tensors() { return tensors_; }
  const Tensor& first() const { return params_.first(); }

  // To be called when the buffers were written.
  void return_params() { params_.return_copies(); }
  void return_moments() {
    exp_avgs_.return_copies();
    exp_avg_sqs_.return_copies();
  }

 private:
  DenseList params_, exp_avgs_, exp_avg_sqs_;
  std::optional<DenseList> grads_;
  OptimizedTensors tensors_;
};

}  // namespace evakernels
