// How the threads of a block share rows, and what the kernels of all norms do with one.
//
// A row is cut into vectors of E elements; V of them belong to each of its threads, which keeps them in
// registers, so that memory is read once. With V = 0 a row is too wide for that and is read again each time.
// Rows that one warp can hold need no barrier: a block has several, one for each threadIdx.y. Wider ones have
// a block to themselves.
#pragma once

#include "cuda/elements.cuh"

namespace evakernels::cuda {

constexpr int kMaxBlockWarps = 32;

// Calls body(vector, slot) for each vector of the row that is this thread's.
template <int V, class Body>
__device__ __forceinline__ void for_each_vector(int vectors, const Body& body) {
  if constexpr (V == 0) {
    for (int vector = threadIdx.x; vector < vectors; vector += blockDim.x) body(vector, 0);
  } else {
#pragma unroll
    for (int slot = 0; slot < V; ++slot) {
      const int vector = slot * blockDim.x + threadIdx.x;
      if (vector < vectors) body(vector, slot);
    }
  }
}

// The rows of a thread, from first_row() on in steps of row_step().
__device__ __forceinline__ int64_t first_row() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t row_step() { return int64_t{gridDim.x} * blockDim.y; }

// Sums over the threads of a row, of which all get the same.
class RowSums {
 public:
  template <int N>
  __device__ __forceinline__ void operator()(float (&values)[N]) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int n = 0; n < N; ++n) values[n] += __shfl_xor_sync(kWholeWarp, values[n], distance);
    }
    if (blockDim.x > kWarpSize) add_warps(values);
  }

 private:
  struct Scratch {
    float sums[2][2][kMaxBlockWarps];  // by buffer, sum and warp
  };

  template <int N>
  __device__ __forceinline__ void add_warps(float (&values)[N]) {
    static_assert(N <= 2);
    // Double-buffered: a warp may write the next sum while another still reads this one, but not the one
    // after.
    float (&sums)[2][kMaxBlockWarps] = shared_memory<Scratch>().sums[buffer_];
    buffer_ ^= 1;
    if (threadIdx.x % kWarpSize == 0) {
      for (int n = 0; n < N; ++n) sums[n][threadIdx.x / kWarpSize] = values[n];
    }
    __syncthreads();
    const int warps = blockDim.x / kWarpSize;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      values[n] = sums[n][0];
      for (int warp = 1; warp < warps; ++warp) values[n] += sums[n][warp];
    }
  }

  int buffer_ = 0;
};

// The part of a matrix's row that is a thread's, as it lies in memory.
template <class T, int E, int V>
class RowPart {
 public:
  // For each row anew: kernels that moved their pointers on from row to row took up to 20 registers more
  // (nvcc 13.0, sm_90).
  __device__ __forceinline__ void point_to(const void* matrix, int64_t row, int64_t width) {
    row_ = static_cast<const T*>(matrix) + row * width;
  }

  // From the row that begins `ahead` elements after the one that this points to.
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

// The row of a matrix that a kernel doesn't have.
struct NoRow {
  static constexpr int kStages = 0;

  __device__ __forceinline__ void use(int64_t, const char*) const {}
  __device__ __forceinline__ void point_to(const void*, int64_t, int64_t) const {}
  template <class... Part>
  __device__ __forceinline__ void fetch(Part...) const {}
  __device__ __forceinline__ void change_stages() const {}
};

// A row whose elements are needed once, and loaded then. The matrix may be null.
template <class T, int E>
class PassingRow {
 public:
  __device__ __forceinline__ void point_to(const void* matrix, int64_t row, int64_t width) {
    matrix_ = static_cast<const T*>(matrix);
    first_ = row * width;
  }

  template <class... Part>
  __device__ __forceinline__ void fetch(Part...) const {}

  __device__ __forceinline__ void get(int vector, int, float (&values)[E]) const {
    Packed<T, E>::load_once(matrix_ + first_ + int64_t{vector} * E).unpack(values);
  }

 private:
  const T* matrix_;
  int64_t first_;
};

// The row of a matrix that is written.
template <class T, int E>
class RowOutput {
 public:
  __device__ __forceinline__ void point_to(void* matrix, int64_t row, int64_t width) {
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

// get(vector, slot, values) gives the elements. The second pass over the row makes the variance accurate when
// the mean is large; it costs no memory access. Rounding moves the mean: if that is large against the
// deviations, and all there is of them if the elements are equal, their own mean is subtracted too.
template <int E, int V, class Get>
__device__ __forceinline__ RowStatistics row_statistics(int64_t width, float eps, bool rms, RowSums& row_sums,
                                                        const Get& get) {
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
    return sum[0] / static_cast<float>(width);
  };
  float mean = 0.0f, subtracted = 0.0f, variance;
#pragma unroll 1  // else kernels spill registers
  do {
    if (!rms) subtracted = mean_of([&](float x) { return x - mean; });
    mean += subtracted;
    variance = mean_of([&](float x) { return (x - mean) * (x - mean); });
  } while (subtracted * subtracted > 100.0f * variance);
  return {mean, 1.0f / sqrtf(variance + eps)};
}

// By one thread of the row.
__device__ __forceinline__ void write_statistics(const RowStatistics& statistics, int64_t row, bool rms,
                                                 float* mean, float* rstd) {
  if (threadIdx.x != 0) return;
  if (!rms) mean[row] = statistics.mean;
  rstd[row] = statistics.rstd;
}

// The gradient of a norm: with g that of the normalised row, (g - shift - normalised * slope) * rstd is that
// of x. g is rounded before it is summed and before the sums are subtracted: in a row of one element they
// cancel, and rstd, then 1 / sqrt(eps), would make what is left of a fused product large.
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

// Without shift and slope yet.
__device__ __forceinline__ RowGradient gradient_of_row(int64_t row, const float* mean, const float* rstd,
                                                       bool rms) {
  return {rms ? 0.0f : mean[row], rstd[row], 0.0f, 0.0f};
}

// get(vector, slot, g, x) gives the gradient of the normalised row and the row.
template <int E, int V, class Get>
__device__ __forceinline__ void complete(RowGradient& row, int64_t width, bool rms, RowSums& row_sums,
                                         const Get& get) {
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
  row.shift = rms ? 0.0f : sums[0] / static_cast<float>(width);
  row.slope = sums[1] / static_cast<float>(width);
}

}  // namespace evakernels::cuda
