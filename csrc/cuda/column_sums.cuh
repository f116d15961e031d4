// Sums over all rows, one per column: gradients of weights.
//
// Each block accumulates its rows in registers and writes one partial sum per column; a second kernel adds
// these. The order of additions depends on the sizes and the GPU alone: two runs are bit-equal.
#pragma once

#include <optional>

#include "cuda/norm_rows.cuh"

namespace evakernels::cuda {

// COUNT sums per column. partials: [COUNT, blocks, width], or null if no gradient is needed. With STRIPS a
// block has `columns` of each row, and partials points to the first of them.
template <int COUNT, int E, int V, bool STRIPS = false>
class ColumnSums {
 public:
  __device__ __forceinline__ ColumnSums(float* partials, int64_t width)
      : ColumnSums(partials, width, width) {}

  __device__ __forceinline__ ColumnSums(float* partials, int64_t width, int64_t columns)
      : partials_(partials), width_(width), columns_(columns) {
    if constexpr (V == 0) {
      if (!partials) return;
      for_each_vector<V>(vectors(), [&](int vector, int) {
        const float zeros[E] = {};
        for (int n = 0; n < COUNT; ++n) store_floats(partial(n) + int64_t{vector} * E, zeros);
      });
    } else {
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int slot = 0; slot < V; ++slot) {
#pragma unroll
          for (int i = 0; i < E; ++i) sums_[n][slot][i] = 0.0f;
        }
      }
    }
  }

  // A thread always has the same columns, so with V = 0 partial sums are accumulated in global memory.
  __device__ __forceinline__ void add(int n, int vector, int slot, const float (&values)[E]) {
    if constexpr (V == 0) {
      if (!partials_) return;
      float* const sum = partial(n) + int64_t{vector} * E;
      float total[E];
      load_floats(sum, total);
#pragma unroll
      for (int i = 0; i < E; ++i) total[i] += values[i];
      store_floats(sum, total);
    } else {
#pragma unroll
      for (int i = 0; i < E; ++i) sums_[n][slot][i] += values[i];
    }
  }

  __device__ __forceinline__ void write() {
    if constexpr (V > 0) {
      if (!partials_) return;
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        if (blockDim.y > 1) add_rows_of_block(sums_[n]);
        if (threadIdx.y + 1 < blockDim.y) continue;
        for_each_vector<V>(vectors(), [&](int vector, int slot) {
          store_floats(partial(n) + int64_t{vector} * E, sums_[n][slot]);
        });
      }
    }
  }

 private:
  struct Scratch {
    float sums[V * E * kWarpSize];  // one warp's row
  };

  __device__ __forceinline__ int vectors() const {
    return static_cast<int>((STRIPS ? columns_ : width_) / E);
  }

  __device__ __forceinline__ float* partial(int n) const {
    return partials_ + (int64_t{n} * gridDim.x + blockIdx.x) * width_;
  }

  // Adds up the block's rows in order; the last one has the total.
  __device__ __forceinline__ void add_rows_of_block(float (&sums)[V > 0 ? V : 1][E]) {
    float* const total = shared_memory<Scratch>().sums;
    const int count = vectors();
    for (unsigned row = 0; row < blockDim.y; ++row) {
      if (row == threadIdx.y) {
        for_each_vector<V>(count, [&](int vector, int slot) {
#pragma unroll
          for (int i = 0; i < E; ++i) {
            // This layout avoids bank conflicts.
            float& column = total[i * count + vector];
            if (row > 0) sums[slot][i] += column;
            column = sums[slot][i];
          }
        });
      }
      __syncthreads();  // #rows-of-block
    }
  }

  float* partials_;
  int64_t width_;
  int64_t columns_;
  float sums_[COUNT][V > 0 ? V : 1][E];
};

constexpr unsigned kPartialsAtOnce = 32;

template <int COUNT>
struct TotalsScratch {
  float sums[COUNT][kPartialsAtOnce][kWarpSize];
};

// Adds up partial sums: one column per lane. finish(column, totals) writes the gradients.
template <int COUNT, class Finish>
__global__ void __launch_bounds__(kWarpSize* kPartialsAtOnce)
    column_totals_kernel(const float* partials, int64_t partial_rows, int64_t width, Finish finish) {
  const int64_t column = int64_t{blockIdx.x} * kWarpSize + threadIdx.x;
  TotalsScratch<COUNT>& scratch = shared_memory<TotalsScratch<COUNT>>();
  for (int n = 0; n < COUNT; ++n) {
    float sum = 0.0f;
    if (column < width) {
      for (int64_t row = threadIdx.y; row < partial_rows; row += kPartialsAtOnce) {
        sum += load_once(partials + (n * partial_rows + row) * width + column);
      }
    }
    scratch.sums[n][threadIdx.y][threadIdx.x] = sum;  // #partial-sums
  }
  __syncthreads();
  if (threadIdx.y > 0 || column >= width) return;
  float totals[COUNT];
  for (int n = 0; n < COUNT; ++n) {
    totals[n] = 0.0f;
    for (unsigned i = 0; i < kPartialsAtOnce; ++i) totals[n] += scratch.sums[n][i][threadIdx.x];
  }
  finish(column, totals);
}

// Launches a kernel that takes its partial sums, [COUNT, blocks, width], as the last argument, and with
// `finish` the kernel that adds them up.
template <int COUNT, class Finish, class... Parameters, class... Arguments>
Error launch_with_column_sums(const LaunchPlan<Parameters...>& plan, int64_t width,
                              const std::optional<Finish>& finish, Scratch& scratch, Stream stream,
                              const Arguments&... arguments) {
  const int64_t blocks = plan.grid.x;
  float* partials = nullptr;
  Error error = finish ? scratch.allocate(&partials, COUNT * blocks * width) : nullptr;
  if (!error) error = plan.launch(stream, arguments..., partials);
  if (error || !finish) return error;
  return launch(column_totals_kernel<COUNT, Finish>,
                {static_cast<unsigned>(ceil_div(width, kWarpSize)), 1, 1}, {kWarpSize, kPartialsAtOnce, 1},
                stream, partials, blocks, width, *finish);
}

}  // namespace evakernels::cuda
