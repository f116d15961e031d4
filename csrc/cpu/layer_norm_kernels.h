// The row loops of layer_norm: one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "common/layer_norm.h"
#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

struct LayerNormKernels {
  // Normalises rows [begin, end). weight and bias replace those of the parameters: never null, [width].
  void (*forward)(const LayerNormForward& params, const float* weight, const float* bias, int64_t begin,
                  int64_t end);

  // Writes dx for rows [begin, end) and adds their share to dweight and dbias, [width] each, either may be
  // null.
  void (*backward)(const LayerNormBackward& params, const float* weight, float* dweight, float* dbias,
                   int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const LayerNormKernels layer_norm;)

}  // namespace evakernels::cpu
