#include "cpu/gelu.h"

#include "cpu/gelu_kernels.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

const GeluKernels& kernels_for(Isa isa) { return EVAKERNELS_OF_ISA(isa, gelu); }

template <class Params>
Params in_long_rows(Params params) {
  const int64_t merged = params.bias ? 1 : rows_in_one(params.rows, params.width);
  params.rows /= merged;
  params.width *= merged;
  return params;
}

}  // namespace

void gelu_forward(const GeluForward& given, Isa isa, ParallelFor parallel_for) {
  const auto params = in_long_rows(given);
  const GeluKernels& kernels = kernels_for(isa);
  const FloatVector bias(params.bias, params.bias_dtype, params.width, 0.0f);
  run_parallel(parallel_for, params.rows, tasks_grain(params.width),
               [&](int64_t begin, int64_t end) { kernels.forward(params, bias.data(), begin, end); });
}

void gelu_backward(const GeluBackward& given, Isa isa, ParallelFor parallel_for) {
  const auto params = in_long_rows(given);
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
