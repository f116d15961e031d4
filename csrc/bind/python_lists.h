// What the Python bindings of the optimizers share: lists of arrays as arrays of OptimizedTensor.
#pragma once

#include <string>
#include <vector>

#include "bind/array_view.h"
#include "bind/optimizer_numbers.h"
#include "common/optimizer.h"

namespace evakernels {

using List = std::vector<pybind11::object>;

inline TensorBuffer buffer_of(const Array& array, int64_t size) {
  require(product(array.sizes) == size, std::string(array.name) + " must have the sizes of params");
  return {array.data, array.dtype};
}

inline float* one_float(const Array& array) {
  if (!array) return nullptr;
  require_dtype(array, DType::Float32);
  require(product(array.sizes) == 1, std::string(array.name) + " must have one element");
  return array.floats();
}

// Everything but gradients and rates. What a phase doesn't write may be read-only.
inline std::vector<OptimizedTensor> tensors_of(Arrays& arrays, const List& params, const List& exp_avgs,
                                               const List& exp_avg_sqs, const List& steps,
                                               const std::vector<double>& weight_decays) {
  const size_t count = params.size();
  require(exp_avgs.size() == count && exp_avg_sqs.size() == count && steps.size() == count &&
              weight_decays.size() == count,
          "the lists must be equally long");
  std::vector<OptimizedTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const Array param = arrays.write(params[i], "params");
    const int64_t size = product(param.sizes);
    tensors[i] = {
        .param = buffer_of(param, size),
        .grad = {},
        .exp_avg = buffer_of(arrays.write(exp_avgs[i], "exp_avgs"), size),
        .exp_avg_sq = buffer_of(arrays.write(exp_avg_sqs[i], "exp_avg_sqs"), size),
        .step = one_float(arrays.write(steps[i], "steps")),
        .size = size,
        .lr = 0.0,
        .weight_decay = weight_decays[i],
        .rounding = {kNearest, 0},
    };
  }
  return tensors;
}

inline void set_grads(std::vector<OptimizedTensor>& tensors, Arrays& arrays, const List& grads) {
  require(grads.size() == tensors.size(), "the lists must be equally long");
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].grad = buffer_of(arrays.read(grads[i], "grads"), tensors[i].size);
  }
}

}  // namespace evakernels
