// What the optimizers' kernels do with a chunk of a tensor (tensor_table.cuh), a block with each.
//
// Four buffers of three dtypes each would make 81 kernels of one. So the dtypes are those of the table, and
// each access decides by them, as all threads of a block do: a thread fetches what it needs as bits, all of
// it before it makes floats of any. It reads them, and the pointers, from the table each time: from a copy
// the compiler would make 81 loops after all.
#pragma once

#include "cuda/norm_rows.cuh"
#include "cuda/tensor_table.cuh"

namespace evakernels::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocks = 4;  // of a multiprocessor, at least

// How many vectors of E elements a thread has under way, of each buffer.
template <int E>
constexpr int kSlots = E == 1 ? 4 : 2;

template <class T>
__device__ __forceinline__ T* at(const TensorBuffer& buffer, int64_t first) {
  return static_cast<T*>(buffer.data) + first;
}

// E elements of a buffer as they lie in memory; those of 16 bits fill the first half.
template <int E>
class Held {
 public:
  __device__ __forceinline__ void fetch(const TensorBuffer& buffer, int64_t first) {
    if (buffer.dtype == DType::Float32) {
      hold(Packed<float, E>::load(in_global_memory(at<const float>(buffer, first))));
    } else {
      hold(Packed<BFloat16, E>::load(in_global_memory(at<const BFloat16>(buffer, first))));
    }
  }

  // Of what isn't read again soon, so that more of the rest stays in the cache.
  __device__ __forceinline__ void fetch_once(const TensorBuffer& buffer, int64_t first) {
    if (buffer.dtype == DType::Float32) {
      hold(Packed<float, E>::load_once(at<const float>(buffer, first)));
    } else {
      hold(Packed<BFloat16, E>::load_once(at<const BFloat16>(buffer, first)));
    }
  }

  __device__ __forceinline__ void get(DType dtype, float (&values)[E]) const {
    with_element_type(dtype, [&](auto type) {
      Packed<decltype(type), E> packed;
      memcpy(&packed, &bits_, sizeof packed);
      packed.unpack(values);
    });
  }

  // Stores the values, and makes them what a load gives from now on.
  static __device__ __forceinline__ void put(const TensorBuffer& buffer, int64_t first, float (&values)[E]) {
    with_element_type(buffer.dtype, [&](auto type) {
      using T = decltype(type);
      const auto packed = Packed<T, E>::pack(values);
      packed.store_whole(at<T>(buffer, first));
      packed.unpack(values);
    });
  }

 private:
  template <class T>
  __device__ __forceinline__ void hold(const Packed<T, E>& packed) {
    memcpy(&bits_, &packed, sizeof packed);
  }

  Packed<float, E> bits_;
};

// Of elements `first` and so on: makes them what bfloat16 holds, or leaves them as they are.
template <int E>
__device__ __forceinline__ void round_by(const RoundingKey& rounding, int64_t first, float (&values)[E]) {
  if (!rounding.is_stochastic) return;
#pragma unroll
  for (int k = 0; k < E; ++k) {
    values[k] = rounded_to_bfloat16(values[k], random_bits(rounding, static_cast<uint32_t>(first) + k));
  }
}

// Calls fetch(slot, i) for kSlots numbers i below count that are this thread's, then use(slot, i) for the
// same, and so on with the next ones.
template <int E, class Fetch, class Use>
__device__ __forceinline__ void for_each_group(int count, const Fetch& fetch, const Use& use) {
  for (int first = threadIdx.x; first < count; first += kSlots<E> * kThreads) {
#pragma unroll
    for (int slot = 0; slot < kSlots<E>; ++slot) {
      if (first + slot * kThreads < count) fetch(slot, first + slot * kThreads);
    }
#pragma unroll
    for (int slot = 0; slot < kSlots<E>; ++slot) {
      if (first + slot * kThreads < count) use(slot, first + slot * kThreads);
    }
  }
}

// What holds for all tensors of an optimizer's step.
struct StepOptions {
  MomentRates rates;
  float eps;
  const float* grad_scale;
  const float* found_inf;

  // The gradient is divided by the scale through its reciprocal, to the same bits where that is a power of
  // two.
  __device__ __forceinline__ float factor_of_gradients() const {
    return grad_scale ? 1.0f / load(grad_scale) : 1.0f;
  }

  __device__ __forceinline__ void change_moments(float gradient, float& average, float& average_sq) const {
    average = average * rates.beta1 + gradient * rates.one_minus_beta1;
    average_sq = average_sq * rates.beta2 + gradient * gradient * rates.one_minus_beta2;
  }
};

template <int N>
struct TotalScratch {
  double sums[N][kWarps];
};

// The sums over [first, last) of N interleaved partial sums, by all threads of a block: thread n < N gets the
// n-th. There may be thousands, which float32 would add with a visible error.
template <int N>
__device__ __forceinline__ float total_of(const float* partials, int64_t first, int64_t last) {
  double sums[N] = {};
  for (int64_t chunk = first + threadIdx.x; chunk < last; chunk += kThreads) {
    for (int n = 0; n < N; ++n) sums[n] += load_once(partials + N * chunk + n);
  }
  double (&of_warps)[N][kWarps] = shared_memory<TotalScratch<N>>().sums;
  for (int n = 0; n < N; ++n) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sums[n] += __shfl_xor_sync(kWholeWarp, sums[n], distance);
    }
    if (threadIdx.x % kWarpSize == 0) of_warps[n][threadIdx.x / kWarpSize] = sums[n];
  }
  __syncthreads();
  if (threadIdx.x >= N) return 0.0f;
  double total = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) total += of_warps[threadIdx.x][warp];
  return static_cast<float>(total);
}

}  // namespace evakernels::cuda
