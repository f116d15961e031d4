#include "include/layer_norm.h"

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
void layer_norm_forward(const LayerNormForward& params, Isa isa, ParallelFor parallel_for) {
  const LayerNormKernels& kernels = EVAKERNELS_OF_ISA(isa, layer_norm);
  const FloatVector weight(params.weight, params.weight_dtype, params.width, 1.0f);
  const FloatVector bias(params.bias, params.weight_dtype, params.width, 0.0f);
  run_parallel(parallel_for, params.rows, tasks_grain(params.width), [&](int64_t begin, int64_t end) {
    kernels.forward(params, weight.data(), bias.data(), begin, end);
  });
}

void layer_norm_backward(const LayerNormBackward& params, Isa isa, ParallelFor parallel_for) {
  const LayerNormKernels& kernels = EVAKERNELS_OF_ISA(isa, layer_norm);
  const FloatVector weight(params.weight, params.weight_dtype, params.width, 1.0f);
  const RowChunks chunks(params.rows, params.width);
  ChunkedSum dweight(params.dweight, params.weight_dtype, chunks.count, params.width);
  ChunkedSum dbias(params.dbias, params.weight_dtype, chunks.count, params.width);
  chunks.run(parallel_for, [&](int64_t chunk, int64_t first, int64_t last) {
    kernels.backward(params, weight.data(), dweight.row(chunk), dbias.row(chunk), first, last);
  });
  dweight.write_total(parallel_for);
  dbias.write_total(parallel_for);
}

}  // namespace evakernels::cpu
