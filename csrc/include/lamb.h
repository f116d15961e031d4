// Parameters of the lamb launchers: the two phases of the optimizer over all tensors of a model. Norms and
// flags lie where the kernels run.
#pragma once

#include <cstdint>

#include "common/api.h"
#include "common/optimizer.h"
#include "cpu/isa_namespaces.h"
#include "cpu/parallel.h"
#include "cuda/stream.h"

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

namespace cpu {

// The squared norms depend on the shapes alone, never on the number of threads.
EVAKERNELS_API void lamb_update(const LambUpdate& params, Isa isa, ParallelFor parallel_for);

EVAKERNELS_API void lamb_apply(const LambApply& params, Isa isa, ParallelFor parallel_for);
EVAKERNELS_API void lamb_step(const LambStep& params, Isa isa, ParallelFor parallel_for);

// How a tensor's moments change with its gradient times grad_factor.
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

// The element loops of lamb: one table of functions for each instruction set.
struct LambKernels {
  // Elements [begin, end): the moments (null: they stay as they are), and their share of the norms.
  LambSquaredNorms (*update)(const OptimizedTensor& tensor, const LambMoments* moments,
                             const LambDirection& direction, int64_t begin, int64_t end);

  // Elements [begin, end): w -= factor * u
  void (*apply)(const OptimizedTensor& tensor, const LambDirection& direction, float factor,
                const RoundingKey& rounding, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const LambKernels lamb;)

}  // namespace cpu

namespace cuda {

// A launcher reads the array of tensors before it returns; the kernels read the buffers.
// The squared norms depend on the sizes and on how the buffers are aligned, never on the GPU.
EVAKERNELS_API Error lamb_update(const LambUpdate& params, Scratch& scratch, Stream stream);

EVAKERNELS_API Error lamb_apply(const LambApply& params, Scratch& scratch, Stream stream);

// To the same bits as both.
EVAKERNELS_API Error lamb_step(const LambStep& params, Scratch& scratch, Stream stream);

}  // namespace cuda

}  // namespace evakernels
