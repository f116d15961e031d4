// The element loops of lamb: one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "common/lamb.h"
#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

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

struct LambKernels {
  // Elements [begin, end): the moments (null: they stay as they are), and their share of the norms.
  LambSquaredNorms (*update)(const OptimizedTensor& tensor, const LambMoments* moments,
                             const LambDirection& direction, int64_t begin, int64_t end);

  // Elements [begin, end): w -= factor * u
  void (*apply)(const OptimizedTensor& tensor, const LambDirection& direction, float factor,
                const RoundingKey& rounding, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const LambKernels lamb;)

}  // namespace evakernels::cpu
