// What the bindings of the optimizers are given besides tensors, a number for each of them, and the params
// that they make of all.
#pragma once

#include <vector>

#include "bind/array.h"
#include "common/lamb.h"

namespace evakernels {

using Numbers = std::vector<int64_t>;

// What params point to.
using OptimizedTensors = std::vector<OptimizedTensor>;

inline void set_lrs(OptimizedTensors& tensors, const std::vector<double>& lrs) {
  require(lrs.size() == tensors.size(), "lrs must be as many as params");
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].lr = lrs[i];
}

// On the device; null: not given.
struct StepFlags {
  const float* grad_scale;
  const float* found_inf;
};

inline int64_t count_of(const OptimizedTensors& tensors) { return static_cast<int64_t>(tensors.size()); }

inline LambUpdate lamb_update_params(const OptimizedTensors& tensors, const LambOptions& options,
                                     float* squared_norms, const StepFlags& flags) {
  return {tensors.data(), count_of(tensors), options, squared_norms, flags.grad_scale, flags.found_inf};
}

inline LambApply lamb_apply_params(const OptimizedTensors& tensors, const LambOptions& options,
                                   const float* squared_norms, const float* found_inf) {
  return {tensors.data(), count_of(tensors), options, squared_norms, found_inf};
}

inline LambStep lamb_step_params(const OptimizedTensors& tensors, const LambOptions& options,
                                 const StepFlags& flags) {
  return {tensors.data(), count_of(tensors), options, flags.grad_scale, flags.found_inf};
}

// Without seeds: to the nearest.
inline void set_rounding(OptimizedTensors& tensors, const Numbers& seeds, const Numbers& first_elements) {
  if (seeds.empty()) return;
  require(seeds.size() == tensors.size() && first_elements.size() == tensors.size(),
          "seeds and first_elements must be as many as params");
  for (size_t i = 0; i < tensors.size(); ++i) {
    require(tensors[i].param.dtype == DType::BFloat16, "params must be bfloat16 where there are seeds");
    require(seeds[i] >= 0 && first_elements[i] >= 0, "seeds and first_elements must be 0 or more");
    tensors[i].rounding = {seeds[i], first_elements[i]};
  }
}

}  // namespace evakernels
