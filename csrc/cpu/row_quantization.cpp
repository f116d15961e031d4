#include "include/row_quantization.h"

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
void quantize_rows(const QuantizeRows& params, Isa isa, ParallelFor parallel_for) {
  const RowQuantizationKernels& kernels = EVAKERNELS_OF_ISA(isa, row_quantization);
  run_parallel(parallel_for, params.rows, tasks_grain(params.width),
               [&](int64_t begin, int64_t end) { kernels.quantize(params, begin, end); });
}

void dequantize_rows(const DequantizeRows& params, Isa isa, ParallelFor parallel_for) {
  const RowQuantizationKernels& kernels = EVAKERNELS_OF_ISA(isa, row_quantization);
  const FloatVector bias(params.bias, params.bias_dtype, params.width, 0.0f);
  run_parallel(parallel_for, params.rows, tasks_grain(params.width),
               [&](int64_t begin, int64_t end) { kernels.dequantize(params, bias.data(), begin, end); });
}

}  // namespace evakernels::cpu
