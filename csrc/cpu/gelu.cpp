#include "cpu/gelu.h"

#include "cpu/gelu_kernels.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

const GeluKernels& kernels_for(Isa isa) { return EVAKERNELS_OF_ISA(isa, gelu); }

}  // namespace

void gelu_forward(const GeluForward& params, Isa isa, ParallelFor parallel_for) {
  const GeluKernels& kernels = kernels_for(isa);
  const FloatVector bias(params.bias, params.bias_dtype, params.width, 0.0f);
  run_parallel(parallel_for, params.rows, tasks_grain(params.width),
               [&](int64_t begin, int64_t end) { kernels.forward(params, bias.data(), begin, end); });
}

void gelu_backward(const GeluBackward& params, Isa isa, ParallelFor parallel_for) {
  const GeluKernels& kernels = kernels_for(isa);
  const FloatVector bias(params.bias, params.bias_dtype, params.width, 0.0f);
  const RowChunks chunks(params.rows, params.width);
  ChunkedSum dbias(params.dbias, params.bias_dtype, chunks.count, params.width);
  chunks.run(parallel_for, [&](int64_t chunk, int64_t first, int64_t last) {
    kernels.backward(params, bias.data(), dbias.row(chunk), first, last);
  });
  dbias.write_total(parallel_for);
}

}  // namespace evakernels::cpu
