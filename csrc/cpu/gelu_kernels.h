// The row loops of gelu: one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "common/gelu.h"
#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

struct GeluKernels {
  // Rows [begin, end). bias replaces that of the parameters, [width].
  void (*forward)(const GeluForward& params, const float* bias, int64_t begin, int64_t end);

  // Writes dx for rows [begin, end) and adds their share to dbias, [width], which may be null.
  void (*backward)(const GeluBackward& params, const float* bias, float* dbias, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const GeluKernels gelu;)

}  // namespace evakernels::cpu
