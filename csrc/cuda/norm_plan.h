// How the rows of a norm are laid over threads.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/elements.cuh"
#include "include/residual_norm.h"

namespace evakernels::cuda {

constexpr int kRowsPerBlock = 4;  // where a row is one warp's
constexpr int kStreamingThreads = 256;
constexpr int kStep = 8;  // kernels are compiled for multiples of so many elements a thread

// What registers allow.
struct RowLimits {
  int elements;  // of a thread
  int threads;   // of a block
};

// E elements a vector, V vectors a thread (see norm_rows.cuh), THREADS a block at most.
template <int E_, int V_, int THREADS>
struct Layout {
  static constexpr int E = E_;
  static constexpr int V = V_;
  static constexpr int kThreads = THREADS;
  // Of a multiprocessor, at least: with 16-bit elements the registers of twelve warps, which keep enough
  // loads on their way; in streaming kernels the compiler would else spill to make room for twice as many.
  static constexpr int kBlocks = V == 0 ? 4 : E < 8 ? 1 : std::max(1, 384 / THREADS);
  static constexpr bool kStaged = false;
};

// Pairs of 16-bit elements, of rows that go by way of shared memory (staged_rows.cuh).
template <int V, int THREADS>
struct Staged : Layout<2, V, THREADS> {
  static constexpr int kBlocks = 512 / THREADS;  // with more, backward kernels would spill
  static constexpr bool kStaged = true;
};

constexpr int kLine = 128;  // bytes that a cache holds side by side

// Of shared memory, for a row that begins anywhere in a line.
__host__ __device__ inline int stage_bytes(int64_t width) {
  return (static_cast<int>(width) * 2 + kLine + kWidestAccess - 1) / kWidestAccess * kWidestAccess;
}

// The elements of a thread where E at a time are accessed: fewer where the accesses themselves take
// registers.
constexpr int elements_per_thread(int E, const RowLimits& limits) {
  return E == 1 ? kStep : E == 2 ? limits.elements * 3 / 4 : limits.elements;
}

struct RowPlan {
  int elements;  // of a vector
  int vectors;   // of a thread; 0: the row doesn't fit into registers
  dim3 block;
};

// A matrix or vector that is read or written E elements at a time.
struct Buffer {
  const void* data;
  DType dtype;
};

inline Buffer buffer_of(const ParameterVector& vector) { return {vector.data, vector.dtype}; }

inline int size_of(DType dtype) { return dtype == DType::Float32 ? 4 : 2; }

// The most elements, up to `most`, that can be accessed at once in every row of every buffer.
inline int aligned_elements(int most, int64_t width, const std::vector<Buffer>& buffers) {
  for (const int elements : {most, 2}) {
    bool aligned = width % elements == 0;
    for (const Buffer& buffer : buffers) {
      const int bytes = std::min(kWidestAccess, elements * size_of(buffer.dtype));
      aligned = aligned && reinterpret_cast<uintptr_t>(buffer.data) % bytes == 0;
    }
    if (aligned) return elements;
  }
  return 1;
}

// `wide`: elements of 16 bytes. `fewest_steps`: of the kernels for `wide` elements.
inline RowPlan plan_row(int64_t width, int wide, int elements, const RowLimits& limits, int fewest_steps) {
  const int per_thread = elements_per_thread(elements, limits);
  const int64_t warps = std::max<int64_t>(1, ceil_div(width, per_thread * kWarpSize));
  if (warps * kWarpSize > limits.threads) return {elements == wide ? wide : 1, 0, {kStreamingThreads, 1, 1}};
  const unsigned threads = static_cast<unsigned>(warps * kWarpSize);
  const dim3 block = {threads, warps == 1 ? kRowsPerBlock : 1u, 1};
  if (elements < wide) return {elements, per_thread / elements, block};
  // No more steps than the row needs, if there is such a kernel: empty vectors would cost time.
  const int64_t needed = ceil_div(width, int64_t{threads} * kStep);
  const int steps = static_cast<int>(std::max<int64_t>(fewest_steps, needed));
  return {elements, steps * kStep / elements, block};
}

}  // namespace evakernels::cuda
