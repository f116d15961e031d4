#include "include/swiglu.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

template <class Params>
Params in_long_rows(Params params) {
  const bool dense = params.gate.stride == params.width && params.up.stride == params.width;
  const int64_t merged = dense && !params.norm_weight ? rows_in_one(params.rows, params.width) : 1;
  params.rows /= merged;
  for (int64_t* size : {&params.width, &params.gate.stride, &params.up.stride}) *size *= merged;
  return params;
}

}  // namespace

void swiglu_forward(const SwigluForward& given, Isa isa, ParallelFor parallel_for) {
  const auto params = in_long_rows(given);
  const SwigluKernels& kernels = EVAKERNELS_OF_ISA(isa, swiglu);
  const bool norm = params.norm_weight != nullptr;
  const FloatVector weight(params.norm_weight, params.weight_dtype, norm ? params.width : 0, 1.0f);
  const FloatVector bias(params.norm_bias, params.weight_dtype, norm ? params.width : 0, 0.0f);
  run_parallel(parallel_for, params.rows, tasks_grain(params.width), [&](int64_t begin, int64_t end) {
    AlignedFloats scratch(norm ? kSwigluScratch * params.width : 0);
    kernels.forward(params, norm ? weight.data() : nullptr, bias.data(), scratch.data(), begin, end);
  });
}

void swiglu_backward(const SwigluBackward& given, Isa isa, ParallelFor parallel_for) {
  const auto params = in_long_rows(given);
  const SwigluKernels& kernels = EVAKERNELS_OF_ISA(isa, swiglu);
  const bool norm = params.norm_weight != nullptr;
  const FloatVector weight(params.norm_weight, params.weight_dtype, norm ? params.width : 0, 1.0f);
  const RowChunks chunks(params.rows, params.width);
  ChunkedSum dweight(params.dweight, params.weight_dtype, chunks.count, params.width);
  ChunkedSum dbias(params.dbias, params.weight_dtype, chunks.count, params.width);
  chunks.run(parallel_for, [&](int64_t chunk, int64_t first, int64_t last) {
    AlignedFloats scratch(norm ? kSwigluScratch * params.width : 0);
    kernels.backward(params, norm ? weight.data() : nullptr, dweight.row(chunk), dbias.row(chunk),
                     scratch.data(), first, last);
  });
  dweight.write_total(parallel_for);
  dbias.write_total(parallel_for);
}

}  // namespace evakernels::cpu
