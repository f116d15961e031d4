// Row-wise building blocks of the norm kernels: loads, reductions, statistics and gradients of a row.
//
// A row is split into vectors of E elements; each thread keeps V of them in registers. With V = 0 the row is
// too wide for registers and is read again in every pass. A row that fits into one warp needs no block
// barrier, and a block processes several, one per threadIdx.y; a wider row has a separate block.
#pragma once

#include "cuda/elements.cuh"
#include "include/layer_norm.h"

namespace evakernels::cuda {

constexpr int kMaxBlockWarps = 32;

// Calls body(vector, slot) for each of this thread's vectors of a row.
template <int V, class Body>
__device__ __forceinline__ void for_each_vector(int vectors, const Body& body) {
  if constexpr (V == 0) {
    for (int vector = threadIdx.x; vector < vectors; vector += blockDim.x) body(vector, 0);
  } else {
#pragma unroll
    for (int slot = 0; slot < V; ++slot) {
      const int vector = slot * blockDim.x + threadIdx.x;
      if (vector < vectors) body(vector, slot);  // #vectors
    }
  }
}

// Grid-stride loop over rows.
__device__ __forceinline__ int64_t first_row() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t row_step() { return int64_t{gridDim.x} * blockDim.y; }

// All-reduces sums over the threads of a row.
class RowSums {
 public:
  template <int N>
  __device__ __forceinline__ void operator()(float (&values)[N]) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int n = 0; n < N; ++n) values[n] += __shfl_xor_sync(kFullMask, values[n], distance);
    }
    if (blockDim.x > kWarpSize) add_warps(values);
  }

 private:
  struct Scratch {
    float sums[2][2][kMaxBlockWarps];  // [buffer][sum][warp]
  };

  template <int N>
  __device__ __forceinline__ void add_warps(float (&values)[N]) {
    static_assert(N <= 2);
    // Double-buffered: a warp may write the next sum while another still reads this one.
    float (&sums)[2][kMaxBlockWarps] = shared_memory<Scratch>().sums[buffer_];
    buffer_ ^= 1;  // #buffer
    if (threadIdx.x % kWarpSize == 0) {
      for (int n = 0; n < N; ++n) sums[n][threadIdx.x / kWarpSize] = values[n];
    }
    __syncthreads();  // #warp-sums
    const int warps = blockDim.x / kWarpSize;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      values[n] = sums[n][0];
      for (int warp = 1; warp < warps; ++warp) values[n] += sums[n][warp];
    }
  }

  int buffer_ = 0;
};

// A thread's part of an input row, in its memory format.
template <class T, int E, int V>
class RegisterRow {
 public:
  // Computed per row: pointers that advance from row to row would take up to 20 registers more.
  __device__ __forceinline__ void set_row(const void* matrix, int64_t row, int64_t width) {
    row_ = static_cast<const T*>(matrix) + row * width;
  }

  // Loads from the row that begins `ahead` elements after the current one.
  __device__ __forceinline__ void fetch(int vector, int slot, int64_t ahead = 0) {
    if constexpr (V > 0) held_[slot] = Packed<T, E>::load_once(row_ + ahead + int64_t{vector} * E);
  }

  __device__ __forceinline__ void get(int vector, int slot, float (&values)[E]) const {
    if constexpr (V > 0) {
      held_[slot].unpack(values);
    } else {
      load_floats(row_ + int64_t{vector} * E, values);
    }
  }

 private:
  const T* row_;
  Packed<T, E> held_[V > 0 ? V : 1];
};

// Placeholder for a matrix that a kernel doesn't have.
struct NoRow {
  __device__ __forceinline__ void set_row(const void*, int64_t, int64_t) const {}
};

// An input row with elements that are loaded once, where they are used. The matrix may be null.
template <class T, int E>
class ReadOnceRow {
 public:
  __device__ __forceinline__ void set_row(const void* matrix, int64_t row, int64_t width) {
    matrix_ = static_cast<const T*>(matrix);
    first_ = row * width;
  }

  __device__ __forceinline__ void get(int vector, int, float (&values)[E]) const {
    Packed<T, E>::load_once(matrix_ + first_ + int64_t{vector} * E).unpack(values);
  }

 private:
  const T* matrix_;
  int64_t first_;
};

// An output row.
template <class T, int E>
class RowOutput {
 public:
  __device__ __forceinline__ void set_row(void* matrix, int64_t row, int64_t width) {
    matrix_ = static_cast<T*>(matrix);
    first_ = row * width;
  }

  __device__ __forceinline__ void put(int vector, const float (&values)[E]) const {
    store_floats(matrix_ + first_ + int64_t{vector} * E, values);
  }

 private:
  T* matrix_;
  int64_t first_;
};

struct RowStatistics {
  float mean;
  float rstd;
};

// Two-pass mean and variance; get(vector, slot, values) returns the elements. If the mean's rounding error is
// large compared with the deviations, the mean of the deviations is subtracted as well. The last `padding`
// elements are zero and not counted.
template <int E, int V, class Get>
__device__ __forceinline__ RowStatistics row_statistics(int64_t width, float eps, bool rms, RowSums& row_sums,
                                                        const Get& get, int64_t padding = 0) {
  const int vectors = static_cast<int>(width / E);
  const auto mean_of = [&](const auto& of) {
    float sum[1] = {0.0f};
    for_each_vector<V>(vectors, [&](int vector, int slot) {
      float values[E];
      get(vector, slot, values);
#pragma unroll
      for (int i = 0; i < E; ++i) sum[0] += of(values[i]);
    });
    row_sums(sum);
    if (padding > 0) sum[0] -= static_cast<float>(padding) * of(0.0f);
    return sum[0] / static_cast<float>(width - padding);
  };
  float mean = 0.0f, subtracted = 0.0f, variance;
#pragma unroll 1  // unrolled kernels spill
  do {
    if (!rms) subtracted = mean_of([&](float x) { return x - mean; });
    mean += subtracted;
    variance = mean_of([&](float x) { return (x - mean) * (x - mean); });
  } while (subtracted * subtracted > 100.0f * variance);
  return {mean, 1.0f / sqrtf(variance + eps)};
}

__device__ __forceinline__ void write_statistics(const RowStatistics& statistics, int64_t row, bool rms,
                                                 float* mean, float* rstd) {
  if (threadIdx.x != 0) return;
  if (!rms) mean[row] = statistics.mean;
  rstd[row] = statistics.rstd;
}

// Gradient of a norm: dx = (g - shift - normalised * slope) * rstd, with g the gradient of the normalised
// row. g is rounded (no FMA) before it is summed and subtracted: in a row of one element the terms cancel,
// and rstd = 1 / sqrt(eps) would amplify a rounding difference.
struct RowGradient {
  float mean;
  float rstd;
  float shift;
  float slope;

  __device__ __forceinline__ float normalised(float x) const { return (x - mean) * rstd; }
  __device__ __forceinline__ float of_x(float g, float normalised) const {
    return (g - shift - normalised * slope) * rstd;
  }
};

// shift and slope are set by reduce_gradient.
__device__ __forceinline__ RowGradient gradient_of_row(int64_t row, const float* mean, const float* rstd,
                                                       bool rms) {
  return {rms ? 0.0f : mean[row], rstd[row], 0.0f, 0.0f};
}

// get(vector, slot, g, x) returns the gradient of the normalised row, and the row. In the last `padding`
// elements g is zero; the means don't count them.
template <int E, int V, class Get>
__device__ __forceinline__ void reduce_gradient(RowGradient& row, int64_t width, bool rms, RowSums& row_sums,
                                                const Get& get, int64_t padding = 0) {
  float sums[2] = {0.0f, 0.0f};
  for_each_vector<V>(static_cast<int>(width / E), [&](int vector, int slot) {
    float g[E], x[E];
    get(vector, slot, g, x);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      sums[0] += g[i];
      sums[1] += g[i] * row.normalised(x[i]);
    }
  });
  row_sums(sums);
  const float count = static_cast<float>(width - padding);
  row.shift = rms ? 0.0f : sums[0] / count;
  row.slope = sums[1] / count;
}

// --- weight, bias and scales ---

template <int E>
__device__ __forceinline__ void multiply_by(const ParameterVector& factors, int vector, float (&values)[E]) {
  if (!factors.data) return;
  float factor[E];
  load_floats(factors.data, factors.dtype, int64_t{vector} * E, factor);
#pragma unroll
  for (int i = 0; i < E; ++i) values[i] *= factor[i];
}

// The weight, or ones if there is none.
template <int E>
__device__ __forceinline__ void load_weight(const ParameterVector& weight, int vector, float (&values)[E]) {
#pragma unroll
  for (int i = 0; i < E; ++i) values[i] = 1.0f;
  if (weight.data) load_floats(weight.data, weight.dtype, int64_t{vector} * E, values);
}

// values * weight + bias.
template <int E>
__device__ __forceinline__ void transform(const NormParameters& parameters, int vector, float (&values)[E]) {
  multiply_by(parameters.weight, vector, values);
  if (!parameters.bias.data) return;
  float bias[E];
  load_floats(parameters.bias.data, parameters.bias.dtype, int64_t{vector} * E, bias);
#pragma unroll
  for (int i = 0; i < E; ++i) values[i] += bias[i];
}

__device__ __forceinline__ float row_scale_of(const NormParameters& parameters, int64_t row,
                                              int64_t rows_per_sample) {
  const ParameterVector& scales = parameters.row_scale;
  float scale[1] = {1.0f};
  if (scales.data) load_floats(scales.data, scales.dtype, row / rows_per_sample, scale);
  return scale[0];
}

__device__ __forceinline__ float parameter_at(const ParameterVector& vector, int64_t column,
                                              float otherwise) {
  float value[1] = {otherwise};
  if (vector.data) load_floats(vector.data, vector.dtype, column, value);
  return value[0];
}

__device__ __forceinline__ void write_gradient(const ParameterGradient& gradient, int64_t column,
                                               float value) {
  if (gradient.data) store_float(gradient.data, gradient.dtype, column, value);
}

}  // namespace evakernels::cuda
