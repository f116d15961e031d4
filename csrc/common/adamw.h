// Parameters of the adamw launcher: one step over all tensors of a model. The flags lie where the kernels
// run.
#pragma once

#include "common/optimizer.h"

namespace evakernels {

struct AdamwUpdate {
  const OptimizedTensor* tensors;  // [count]; params, moments and steps are written
  int64_t count;
  double beta1;
  double beta2;
  double eps;
  const float* grad_scale;  // the gradients are divided by it; null: by 1
  const float* found_inf;   // above 0 nothing is written; null: 0
};

}  // namespace evakernels
