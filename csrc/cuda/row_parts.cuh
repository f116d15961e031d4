// Matrices of independent elements, whose rows are cut into even parts, one a block.
#pragma once

#include "cuda/norm_plan.h"

namespace evakernels::cuda {

// Of the rows that a dense matrix is taken as where its columns mean nothing; the last may be shorter.
constexpr int64_t kDenseWidth = 4096;

// Vectors a thread has of one row of one matrix: 32 bytes, enough on their way to hide the latency of the
// memory.
template <class T, int E>
constexpr int kVectors = smaller(8, 32 / (E * int{sizeof(T)}));

struct RowParts {
  unsigned count;
  unsigned threads;  // of each
};

inline RowParts even_parts(int64_t vectors, int per_thread, int most_threads) {
  const int64_t count = ceil_div(vectors, per_thread * most_threads);
  const int64_t warps = ceil_div(ceil_div(ceil_div(vectors, count), per_thread), kWarpSize);
  return {static_cast<unsigned>(count), static_cast<unsigned>(warps * kWarpSize)};
}

// The part of a row of so many vectors that is blockIdx.y's.
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
