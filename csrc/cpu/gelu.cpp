#include "include/gelu.h"

#include <algorithm>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

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
  const GeluKernels& kernels = EVAKERNELS_OF_ISA(isa, gelu);
  const FloatVector bias(params.bias, params.bias_dtype, params.width, 0.0f);
  run_parallel(parallel_for, params.rows, tasks_grain(params.width),
               [&](int64_t begin, int64_t end) { kernels.forward(params, bias.data(), begin, end); });
}

void gelu_backward(const GeluBackward& given, Isa isa, ParallelFor parallel_for) {
  const auto params = in_long_rows(given);
  const GeluKernels& kernels = EVAKERNELS_OF_ISA(isa, gelu);
  const FloatVector bias(params.bias, params.bias_dtype, params.width, 0.0f);
  const RowChunks chunks(params.rows, params.width);
  // Sums blocks of sqrt(n) of a chunk's n rows first, which limits the rounding error.
  const int64_t block_rows =
      std::max(kMinRowsPerChunk, static_cast<int64_t>(std::sqrt(static_cast<double>(chunks.rows_each))));
  ChunkedSum dbias(params.dbias, params.bias_dtype, chunks.count, params.width);
  chunks.run(parallel_for, [&](int64_t chunk, int64_t first, int64_t last) {
    float* sum = dbias.row(chunk);
    if (!sum) return kernels.backward(params, bias.data(), nullptr, first, last);
    AlignedFloats block(params.width);
    for (int64_t begin = first; begin < last; begin += block_rows) {
      std::fill(block.begin(), block.end(), 0.0f);
      kernels.backward(params, bias.data(), block.data(), begin, std::min(begin + block_rows, last));
      for (int64_t i = 0; i < params.width; ++i) sum[i] += block[i];
    }
  });
  dbias.write_total(parallel_for);
}

}  // namespace evakernels::cpu
