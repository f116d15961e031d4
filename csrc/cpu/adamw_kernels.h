// The element loop of adamw: one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "common/adamw.h"
#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

// w = kept w - rate m / (v_factor sqrt(v) + eps)
struct AdamwFactors {
  float kept;
  float rate;
  float v_factor;
  float eps;
};

struct AdamwKernels {
  // Elements [begin, end); the gradient is multiplied with grad_factor.
  void (*update)(const OptimizedTensor& tensor, const MomentRates& rates, float grad_factor,
                 const AdamwFactors& factors, const RoundingKey& rounding, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const AdamwKernels adamw;)

}  // namespace evakernels::cpu
