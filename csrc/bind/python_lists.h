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

// The lists that each optimizer is given. What a phase doesn't write may be read-only.
struct ArrayLists {
  const List &params, &exp_avgs, &exp_avg_sqs, &steps;
  const std::vector<double>& weight_decays;
};

// Everything but gradients, rates and rounding.
inline OptimizedTensors tensors_of(Arrays& arrays, const ArrayLists& lists) {
  const size_t count = lists.params.size();
  require(lists.exp_avgs.size() == count && lists.exp_avg_sqs.size() == count &&
              lists.steps.size() == count && lists.weight_decays.size() == count,
          "the lists must be equally long");
  OptimizedTensors tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const Array param = arrays.write(lists.params[i], "params");
    const int64_t size = product(param.sizes);
    tensors[i].param = buffer_of(param, size);
    tensors[i].exp_avg = buffer_of(arrays.write(lists.exp_avgs[i], "exp_avgs"), size);
    tensors[i].exp_avg_sq = buffer_of(arrays.write(lists.exp_avg_sqs[i], "exp_avg_sqs"), size);
    tensors[i].step = one_float(arrays.write(lists.steps[i], "steps"));
    tensors[i].size = size;
    tensors[i].weight_decay = lists.weight_decays[i];
  }
  return tensors;
}

inline void set_grads(OptimizedTensors& tensors, Arrays& arrays, const List& grads) {
  require(grads.size() == tensors.size(), "the lists must be equally long");
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].grad = buffer_of(arrays.read(grads[i], "grads"), tensors[i].size);
  }
}

inline StepFlags flags_of(Arrays& arrays, const pybind11::object& grad_scale,
                          const pybind11::object& found_inf) {
  return {one_float(arrays.read_if(grad_scale, "grad_scale")),
          one_float(arrays.read_if(found_inf, "found_inf"))};
}

}  // namespace evakernels
