// Parameters of the gradient_norm launcher.
#pragma once

#include "common/optimizer.h"

namespace evakernels {

struct GradientNorm {
  const OptimizedTensor* tensors;  // [count], of which grad and size are read
  int64_t count;
  float* norm;  // one element
};

}  // namespace evakernels
