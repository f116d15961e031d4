// The norm of all tensors together: a block sums up one chunk of one tensor, and a block of a second kernel
// the chunks. Each byte is read once. The order of every addition is fixed, so two runs are bit-equal.
#include "cuda/gradient_norm.h"
#include "cuda/tensor_chunks.cuh"

namespace evakernels::cuda {
namespace {

struct GradientRule {
  using Entry = TableEntry;

  __device__ __forceinline__ void complete(TableEntry&, int64_t) const {}
};

template <int E, class Position>
__device__ __forceinline__ void add_squares(const TensorBuffer& buffer, int count, const Position& position,
                                            float& sum) {
  Held<E> held[kSlots<E>];
  for_each_group<E>(
      count, [&](int slot, int i) { held[slot].fetch(buffer, position(i)); },
      [&](int slot, int) {
        float values[E];
        held[slot].get(buffer.dtype, values);
#pragma unroll
        for (int k = 0; k < E; ++k) sum += values[k] * values[k];
      });
}

// partials is [chunks]. The optimizer reads the gradients next, so they may stay in the cache.
__global__ void __launch_bounds__(kThreads)
    gradient_norm_kernel(const TableEntry* entries, int64_t count, float* partials) {
  const TableEntry& entry = entry_of(entries, count, blockIdx.x);
  const ChunkRange range(entry, blockIdx.x);
  float sum[1] = {0.0f};
  add_squares<kVector>(entry.tensor.grad, range.vectors, [&](int i) { return range.vector(i); }, sum[0]);
  add_squares<1>(entry.tensor.grad, range.edges, [&](int i) { return range.edge(i); }, sum[0]);
  RowSums sum_over_block;
  sum_over_block(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum[0];
}

__global__ void __launch_bounds__(kThreads)
    gradient_norm_total_kernel(const float* partials, int64_t chunks, float* norm) {
  const float total = total_of<1>(partials, 0, chunks);
  if (threadIdx.x == 0) *norm = sqrtf(total);
}

}  // namespace

Error gradient_norm(const GradientNorm& params, Scratch& scratch, Stream stream) {
  const int64_t chunks = chunks_of(params.tensors, params.count);
  TableEntry* entries = nullptr;
  Error error = write_table(params, GradientRule{}, chunks, scratch, stream, &entries);
  float* const partials = reinterpret_cast<float*>(entries + params.count);
  if (!error && chunks > 0) {
    error = launch(gradient_norm_kernel, {static_cast<unsigned>(chunks), 1, 1}, {kThreads, 1, 1}, stream,
                   entries, params.count, partials);
  }
  if (error) return error;
  return launch(gradient_norm_total_kernel, {1, 1, 1}, {kThreads, 1, 1}, stream, partials, chunks,
                params.norm);
}

}  // namespace evakernels::cuda
