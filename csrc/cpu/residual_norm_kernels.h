// The row loops of the norms joined with a residual connection: one table of functions for each instruction
// set.
#pragma once

#include <cstdint>

#include "common/residual_norm.h"
#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

// The parameters as floats. Ones and zeros stand for missing ones, but for layer_scale.
struct ResidualNormVectors {
  const float* weight;       // [width]
  const float* bias;         // [width]
  const float* layer_scale;  // [width]; null: ones
  const float* row_scale;    // [samples]
};

// Sums over rows that the backward pass adds to, [width] each.
struct AddNormSums {
  float* weight;       // null: not wanted
  float* bias;         // null: not wanted
  float* layer_scale;  // null: not wanted
};

// Of g = row_scale * dx. The gradients of all three parameters are multiples of these two.
struct NormAddSums {
  float* gradient;             // g
  float* gradient_normalised;  // g times the normalised row
};

struct ResidualNormKernels {
  // Rows [begin, end). scratch: width floats.
  void (*add_norm_forward)(const AddNormForward& params, const ResidualNormVectors& vectors, float* scratch,
                           int64_t begin, int64_t end);
  void (*norm_add_forward)(const NormAddForward& params, const ResidualNormVectors& vectors, int64_t begin,
                           int64_t end);

  void (*add_norm_backward)(const AddNormBackward& params, const ResidualNormVectors& vectors,
                            const AddNormSums& sums, int64_t begin, int64_t end);
  // scaled_weight: weight * layer_scale, [width].
  void (*norm_add_backward)(const NormAddBackward& params, const float* scaled_weight, const float* row_scale,
                            const NormAddSums& sums, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const ResidualNormKernels residual_norm;)

}  // namespace evakernels::cpu
