// Distribution of rows over threads, and alignment of buffers.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/elements.cuh"
#include "include/layer_norm.h"

namespace evakernels::cuda {

constexpr int kRowsPerBlock = 4;  // if a row fits into a warp
constexpr int kStreamingThreads = 256;
constexpr int kStep = 8;  // elements per thread are multiples of this

// Limits set by registers.
struct RowLimits {
  int elements;  // per thread
  int threads;   // of a block
};

// E elements per vector, V vectors per thread (norm_rows.cuh), at most THREADS per block.
template <int E_, int V_, int THREADS>
struct Layout {
  static constexpr int E = E_;
  static constexpr int V = V_;
  static constexpr int kThreads = THREADS;
  // Minimum blocks per SM: twelve warps for 16-bit elements, which keep enough loads in flight; with more
  // blocks streaming kernels would spill.
  static constexpr int kBlocks = V == 0 ? 4 : E < 8 ? 1 : std::max(1, 384 / THREADS);
};

// Elements per thread with E per access: fewer if the accesses themselves take registers.
constexpr int elements_per_thread(int E, const RowLimits& limits) {
  return E == 1 ? kStep : E == 2 ? limits.elements * 3 / 4 : limits.elements;
}

struct RowPlan {
  int elements;  // per vector
  int vectors;   // per thread; 0: the row doesn't fit into registers
  dim3 block;
};

// A matrix or vector that is accessed E elements at a time.
struct Buffer {
  const void* data;
  DType dtype;
};

inline Buffer buffer_of(const ParameterVector& vector) { return {vector.data, vector.dtype}; }

inline int size_of(DType dtype) { return dtype == DType::Float32 ? 4 : 2; }

// The largest access, `most`, 2 or 1 elements, that is aligned in every row of every buffer.
inline int aligned_elements(int most, int64_t width, const std::vector<Buffer>& buffers) {
  for (const int elements : {most, 2}) {
    bool aligned = width % elements == 0;  // #aligned-rows
    for (const Buffer& buffer : buffers) {
      const int bytes = std::min(kWidestAccess, elements * size_of(buffer.dtype));
      aligned = aligned && reinterpret_cast<uintptr_t>(buffer.data) % bytes == 0;
    }
    if (aligned) return elements;
  }
  return 1;
}

// `wide`: elements per 16 bytes. `fewest_steps`: minimum of the compiled kernels for `wide` elements.
inline RowPlan plan_row(int64_t width, int wide, int elements, const RowLimits& limits, int fewest_steps) {
  const int per_thread = elements_per_thread(elements, limits);
  const int64_t warps = std::max<int64_t>(1, ceil_div(width, per_thread * kWarpSize));
  if (warps * kWarpSize > limits.threads) return {elements == wide ? wide : 1, 0, {kStreamingThreads, 1, 1}};
  const unsigned threads = static_cast<unsigned>(warps * kWarpSize);
  const dim3 block = {threads, warps == 1 ? kRowsPerBlock : 1u, 1};
  if (elements < wide) return {elements, per_thread / elements, block};
  // No more steps than the row needs, as empty vectors cost time.
  const int64_t needed = ceil_div(width, int64_t{threads} * kStep);
  const int steps = static_cast<int>(std::max<int64_t>(fewest_steps, needed));
  return {elements, steps * kStep / elements, block};
}

// --- elementwise ops: rows are split into even parts, one per block ---

// Row width of a dense matrix with meaningless columns; its last row may be shorter.
constexpr int64_t kDenseWidth = 4096;

// Vectors per thread of one row of one matrix: 32 bytes in flight hide memory latency.
template <class T, int E>
constexpr int kVectors = smaller(8, 32 / (E * int{sizeof(T)}));

struct RowParts {
  unsigned count;
  unsigned threads;  // per part
};

inline RowParts even_parts(int64_t vectors, int per_thread, int most_threads) {
  const int64_t count = ceil_div(vectors, per_thread * most_threads);
  const int64_t warps = ceil_div(ceil_div(ceil_div(vectors, count), per_thread), kWarpSize);
  return {static_cast<unsigned>(count), static_cast<unsigned>(warps * kWarpSize)};
}

// Part blockIdx.y of a row.
struct RowPartition {
  int64_t begin;
  int vectors;

  __device__ __forceinline__ explicit RowPartition(int64_t vectors_of_row) {
    const int64_t part = ceil_div(vectors_of_row, int64_t{gridDim.y});
    begin = blockIdx.y * part;
    const int64_t left = vectors_of_row - begin;
    vectors = static_cast<int>(left < part ? left : part);
  }
};

}  // namespace evakernels::cuda
