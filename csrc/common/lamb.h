// Parameters of the lamb launchers: the two phases of the optimizer over all tensors of a model. Only the
// structs and arrays of them lie in the host's memory for sure; buffers, steps, norms and flags lie where the
// kernels run.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace evakernels {

// The limits of the trust ratio in the DeepSpeed variant.
constexpr double kLowestRatio = 0.01, kHighestRatio = 10.0;

struct LambBuffer {
  void* data;
  DType dtype;
};

// The buffers of one parameter, dense, `size` elements each.
struct LambTensor {
  LambBuffer param;       // written by apply
  LambBuffer grad;        // read by update; not there in apply
  LambBuffer exp_avg;     // written by update
  LambBuffer exp_avg_sq;  // written by update
  float* step;            // the number of steps made; counted up by update
  int64_t size;
  double lr;  // for apply
  double weight_decay;
};

struct LambOptions {
  double beta1;
  double beta2;
  double eps;
  bool nvlamb;
};

struct LambUpdate {
  const LambTensor* tensors;  // [count]
  int64_t count;
  LambOptions options;
  float* squared_norms;     // [count, 2], of the parameter and of its direction
  const float* grad_scale;  // the gradients are divided by it; null: by 1
  const float* found_inf;   // above 0 nothing but squared_norms is written; null: 0
};

struct LambApply {
  const LambTensor* tensors;  // [count]
  int64_t count;
  LambOptions options;
  const float* squared_norms;  // [count, 2]
  const float* found_inf;      // above 0 nothing is written; null: 0
};

}  // namespace evakernels
