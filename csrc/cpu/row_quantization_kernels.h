// The row loops of row_quantization: one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "common/row_quantization.h"
#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

struct RowQuantizationKernels {
  // Rows [begin, end), as in all of them.
  void (*quantize)(const QuantizeRows& params, int64_t begin, int64_t end);

  // bias replaces that of the parameters, [width].
  void (*dequantize)(const DequantizeRows& params, const float* bias, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const RowQuantizationKernels row_quantization;)

}  // namespace evakernels::cpu
