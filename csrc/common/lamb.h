// Parameters of the lamb launchers: the two phases of the optimizer over all tensors of a model. Norms and
// flags lie where the kernels run.
#pragma once

#include "common/optimizer.h"

namespace evakernels {

// The limits of the trust ratio in the DeepSpeed variant.
constexpr double kLowestRatio = 0.01, kHighestRatio = 10.0;

struct LambOptions {
  double beta1;
  double beta2;
  double eps;
  bool nvlamb;
};

// Reads params, writes the moments and counts the steps up.
struct LambUpdate {
  const OptimizedTensor* tensors;  // [count]
  int64_t count;
  LambOptions options;
  float* squared_norms;     // [count, 2], of the parameter and of its direction
  const float* grad_scale;  // the gradients are divided by it; null: by 1
  const float* found_inf;   // above 0 nothing but squared_norms is written; null: 0
};

// Reads the moments and steps, writes params.
struct LambApply {
  const OptimizedTensor* tensors;  // [count]
  int64_t count;
  LambOptions options;
  const float* squared_norms;  // [count, 2]
  const float* found_inf;      // above 0 nothing is written; null: 0
};

// Both phases: writes params and the moments, and counts the steps up.
struct LambStep {
  const OptimizedTensor* tensors;  // [count]
  int64_t count;
  LambOptions options;
  const float* grad_scale;  // the gradients are divided by it; null: by 1
  const float* found_inf;   // above 0 nothing is written; null: 0
};

}  // namespace evakernels
