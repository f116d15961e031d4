// What the optimizers step over: the tensors of a model, of any sizes and dtypes. Only arrays of these
// structs lie in the host's memory for sure; buffers, steps and flags lie where the kernels run.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/stochastic_rounding.h"

namespace evakernels {

struct TensorBuffer {
  void* data;
  DType dtype;
};

// The buffers of one parameter, dense, `size` elements each. A launcher tells which of them it reads or
// writes; the others may be null.
struct OptimizedTensor {
  TensorBuffer param;
  TensorBuffer grad;
  TensorBuffer exp_avg;
  TensorBuffer exp_avg_sq;
  float* step;  // the number of steps made
  int64_t size;
  double lr;
  double weight_decay;
  Rounding rounding = {kNearest, 0};  // of param
};

// How the moments change with a gradient g: m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2.
struct MomentRates {
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
};

inline MomentRates moment_rates(double beta1, double beta2) {
  return {static_cast<float>(beta1), static_cast<float>(1.0 - beta1), static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2)};
}

}  // namespace evakernels
