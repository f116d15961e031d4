// The row loops of swiglu: one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "common/swiglu.h"
#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

// Floats that a row's intermediate values need, for each column.
constexpr int64_t kSwigluScratch = 2;

struct SwigluKernels {
  // Rows [begin, end). weight and bias replace those of the parameters, [width]; both null without a norm.
  // scratch: kSwigluScratch * width floats.
  void (*forward)(const SwigluForward& params, const float* weight, const float* bias, float* scratch,
                  int64_t begin, int64_t end);

  // Writes dgate and dup for rows [begin, end) and adds their share to dweight and dbias, [width] each,
  // either may be null.
  void (*backward)(const SwigluBackward& params, const float* weight, float* dweight, float* dbias,
                   float* scratch, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const SwigluKernels swiglu;)

}  // namespace evakernels::cpu
