#include "cpu/swiglu.h"

#include <algorithm>

#include "cpu/rows.h"
#include "cpu/swiglu_kernels.h"

namespace evakernels::cpu {
namespace {

const SwigluKernels& kernels_for(Isa isa) { return EVAKERNELS_OF_ISA(isa, swiglu); }

}  // namespace

void swiglu_forward(const SwigluForward& params, Isa isa, ParallelFor parallel_for) {
  const SwigluKernels& kernels = kernels_for(isa);
  const bool norm = params.norm_weight != nullptr;
  const FloatVector weight(params.norm_weight, params.weight_dtype, norm ? params.width : 0, 1.0f);
  const FloatVector bias(params.norm_bias, params.weight_dtype, norm ? params.width : 0, 0.0f);
  run_parallel(parallel_for, params.rows, tasks_grain(params.width), [&](int64_t begin, int64_t end) {
    AlignedFloats scratch(norm ? kSwigluScratch * params.width : 0);
    kernels.forward(params, norm ? weight.data() : nullptr, bias.data(), scratch.data(), begin, end);
  });
}

void swiglu_backward(const SwigluBackward& params, Isa isa, ParallelFor parallel_for) {
  const SwigluKernels& kernels = kernels_for(isa);
  const bool norm = params.norm_weight != nullptr;
  const FloatVector weight(params.norm_weight, params.weight_dtype, norm ? params.width : 0, 1.0f);
  const int64_t chunk_rows = rows_per_chunk(params.rows);
  const int64_t chunks = ceil_div(params.rows, chunk_rows);
  ChunkedSum dweight(params.dweight, params.weight_dtype, chunks, params.width);
  ChunkedSum dbias(params.dbias, params.weight_dtype, chunks, params.width);
  run_parallel(parallel_for, chunks, tasks_grain(chunk_rows * params.width), [&](int64_t begin, int64_t end) {
    AlignedFloats scratch(norm ? kSwigluScratch * params.width : 0);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * chunk_rows;
      const int64_t last = std::min(first + chunk_rows, params.rows);
      kernels.backward(params, norm ? weight.data() : nullptr, dweight.row(chunk), dbias.row(chunk),
                       scratch.data(), first, last);
    }
  });
  dweight.write_total(parallel_for);
  dbias.write_total(parallel_for);
}

}  // namespace evakernels::cpu
