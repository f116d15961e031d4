// Parameters of the lamb launchers: two phases over all tensors of a model, of any sizes and dtypes. Arrays
// of structs are in host memory; buffers, steps, norms and flags are on the kernels' device.
#pragma once

#include "common/stochastic_rounding.h"
#include "include/launcher.h"

namespace evakernels {

struct TensorBuffer {
  void* data;
  DType dtype;
};

// The dense buffers of one parameter, `size` elements each. Buffers that a launcher doesn't access may be
// null.
struct OptimizedTensor {
  TensorBuffer param;
  TensorBuffer grad;
  TensorBuffer exp_avg;
  TensorBuffer exp_avg_sq;
  float* step;  // number of steps taken
  int64_t size;
  double lr;
  double weight_decay;
  Rounding rounding = {kNearest, 0};  // of the parameter
};

// m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2.
struct MomentRates {
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
};

inline MomentRates moment_rates(double beta1, double beta2) {
  return {static_cast<float>(beta1), static_cast<float>(1.0 - beta1), static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2)};
}

// Bounds of the trust ratio in the DeepSpeed variant.
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

namespace cpu {

// The squared norms don't depend on the number of threads.
void lamb_update(const LambUpdate& params, Isa isa, ParallelFor parallel_for);

void lamb_apply(const LambApply& params, Isa isa, ParallelFor parallel_for);

// Rates of the moments, and the factor that gradients are multiplied with.
struct LambMoments {
  MomentRates rates;
  float grad_factor;
};

// u = m_scale m / (sqrt(v_scale v) + eps) + weight_decay w
struct LambDirection {
  float m_scale;
  float v_scale;
  float eps;
  float weight_decay;
};

struct LambSquaredNorms {
  double param;
  double direction;
};

// The loops of one instruction set.
struct LambKernels {
  // Elements [begin, end): updates the moments unless `moments` is null, and returns a share of the norms.
  LambSquaredNorms (*update)(const OptimizedTensor& tensor, const LambMoments* moments,
                             const LambDirection& direction, int64_t begin, int64_t end);

  // Elements [begin, end): w -= factor * u
  void (*apply)(const OptimizedTensor& tensor, const LambDirection& direction, float factor,
                const RoundingKey& rounding, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const LambKernels lamb;)

}  // namespace cpu

}  // namespace evakernels
