// Rows in 8 bits, and back from a product of them, on the CPU.
#pragma once

#include "common/api.h"
#include "common/row_quantization.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace evakernels::cpu {

EVAKERNELS_API void quantize_rows(const QuantizeRows& params, Isa isa, ParallelFor parallel_for);

EVAKERNELS_API void dequantize_rows(const DequantizeRows& params, Isa isa, ParallelFor parallel_for);

}  // namespace evakernels::cpu
