// LAMB: one launch a phase over all tensors, whatever their number, sizes and dtypes.
//
// A block has one chunk of one tensor. Update leaves the sums of each chunk, and a small kernel adds up those
// of each tensor. The order of every addition is fixed, so two runs are bit-equal. For each element of
// float32 update moves 24 bytes and apply 16: each buffer is read once, and what changes is written once.
//
// Four buffers of three dtypes each would make 81 kernels of one. So the dtypes are those of the table: a
// thread fetches what it needs as bits, all of it before it makes floats of any. It reads them, and the
// pointers, from the table each time: from a copy the compiler would make 81 loops after all.
#include <cmath>

#include "cuda/lamb.h"
#include "cuda/lamb_table.cuh"
#include "cuda/norm_rows.cuh"

namespace evakernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocks = 4;  // of a multiprocessor, at least

// How many vectors of E elements a thread has under way, of each buffer.
template <int E>
constexpr int kSlots = E == 1 ? 4 : 2;

template <class Body>
__device__ __forceinline__ void with_type(DType dtype, const Body& body) {
  if (dtype == DType::Float32) {
    body(float{});
  } else if (dtype == DType::BFloat16) {
    body(BFloat16{});
  } else {
    body(Float16{});
  }
}

template <class T>
__device__ __forceinline__ T* at(const LambBuffer& buffer, int64_t first) {
  return static_cast<T*>(buffer.data) + first;
}

// E elements of a buffer as they lie in memory; those of 16 bits fill the first half.
template <int E>
class Held {
 public:
  __device__ __forceinline__ void fetch(const LambBuffer& buffer, int64_t first) {
    if (buffer.dtype == DType::Float32) {
      hold(Packed<float, E>::load(in_global_memory(at<const float>(buffer, first))));
    } else {
      hold(Packed<BFloat16, E>::load(in_global_memory(at<const BFloat16>(buffer, first))));
    }
  }

  // Of what isn't read again soon, so that more of the rest stays in the cache.
  __device__ __forceinline__ void fetch_once(const LambBuffer& buffer, int64_t first) {
    if (buffer.dtype == DType::Float32) {
      hold(Packed<float, E>::load_once(at<const float>(buffer, first)));
    } else {
      hold(Packed<BFloat16, E>::load_once(at<const BFloat16>(buffer, first)));
    }
  }

  __device__ __forceinline__ void get(DType dtype, float (&values)[E]) const {
    with_type(dtype, [&](auto type) {
      Packed<decltype(type), E> packed;
      memcpy(&packed, &bits_, sizeof packed);
      packed.unpack(values);
    });
  }

  // Stores the values, and makes them what a load gives from now on.
  static __device__ __forceinline__ void put(const LambBuffer& buffer, int64_t first, float (&values)[E]) {
    with_type(buffer.dtype, [&](auto type) {
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

// How the moments change: m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2.
struct Moments {
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float eps;
  const float* grad_scale;
  const float* found_inf;
};

// The gradient is divided by the scale through its reciprocal, to the same bits where that is a power of two.
// `changes`: else the moments stay as they are.
template <int E, class Position>
__device__ __forceinline__ void update(const LambEntry& entry, const Moments& moments, bool changes,
                                       float grad_factor, int count, const Position& position,
                                       float (&sums)[2]) {
  const LambTensor& tensor = entry.tensor;
  const LambDirection direction = entry.direction;
  Held<E> w[kSlots<E>], g[kSlots<E>], m[kSlots<E>], v[kSlots<E>];
  for_each_group<E>(
      count,
      [&](int slot, int i) {
        const int64_t first = position(i);
        w[slot].fetch(tensor.param, first);
        m[slot].fetch(tensor.exp_avg, first);
        v[slot].fetch(tensor.exp_avg_sq, first);
        if (changes) g[slot].fetch_once(tensor.grad, first);
      },
      [&](int slot, int i) {
        float average[E], average_sq[E], param[E];
        m[slot].get(tensor.exp_avg.dtype, average);
        v[slot].get(tensor.exp_avg_sq.dtype, average_sq);
        if (changes) {
          float gradient[E];
          g[slot].get(tensor.grad.dtype, gradient);
#pragma unroll
          for (int k = 0; k < E; ++k) {
            gradient[k] *= grad_factor;
            average[k] = average[k] * moments.beta1 + gradient[k] * moments.one_minus_beta1;
            average_sq[k] =
                average_sq[k] * moments.beta2 + gradient[k] * gradient[k] * moments.one_minus_beta2;
          }
          Held<E>::put(tensor.exp_avg, position(i), average);
          Held<E>::put(tensor.exp_avg_sq, position(i), average_sq);
        }
        w[slot].get(tensor.param.dtype, param);
#pragma unroll
        for (int k = 0; k < E; ++k) {
          const float u = direction.of(param[k], average[k], average_sq[k], moments.eps);
          sums[0] += param[k] * param[k];
          sums[1] += u * u;
        }
      });
}

// partials is [chunks, 2].
__global__ void __launch_bounds__(kThreads, kBlocks)
    lamb_update_kernel(const LambEntry* entries, int64_t count, const Moments moments, float* partials) {
  const int64_t chunk = blockIdx.x;
  const LambEntry& entry = entry_of(entries, count, chunk);
  const LambRange range(entry, chunk);
  const bool changes = !is_set(moments.found_inf);
  const float grad_factor = moments.grad_scale ? 1.0f / load(moments.grad_scale) : 1.0f;
  float sums[2] = {0.0f, 0.0f};
  update<kVector>(
      entry, moments, changes, grad_factor, range.vectors, [&](int i) { return range.vector(i); }, sums);
  update<1>(entry, moments, changes, grad_factor, range.edges, [&](int i) { return range.edge(i); }, sums);
  RowSums sum_over_block;
  sum_over_block(sums);
  if (threadIdx.x > 0) return;
  partials[2 * chunk] = sums[0];
  partials[2 * chunk + 1] = sums[1];
}

struct NormScratch {
  double sums[2][kWarps];
};

// A block has one tensor. Its chunks may be thousands, which float32 would add with a visible error.
__global__ void __launch_bounds__(kThreads)
    lamb_norms_kernel(const LambEntry* entries, int64_t chunks, const float* partials, float* squared_norms) {
  const int64_t tensor = blockIdx.x;
  const int64_t first = entries[tensor].first_chunk;
  const int64_t last = tensor + 1 < gridDim.x ? entries[tensor + 1].first_chunk : chunks;
  double sums[2] = {0.0, 0.0};
  for (int64_t chunk = first + threadIdx.x; chunk < last; chunk += kThreads) {
    sums[0] += load_once(partials + 2 * chunk);
    sums[1] += load_once(partials + 2 * chunk + 1);
  }
  double (&of_warps)[2][kWarps] = shared_memory<NormScratch>().sums;
  for (int n = 0; n < 2; ++n) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sums[n] += __shfl_xor_sync(kWholeWarp, sums[n], distance);
    }
    if (threadIdx.x % kWarpSize == 0) of_warps[n][threadIdx.x / kWarpSize] = sums[n];
  }
  __syncthreads();
  if (threadIdx.x >= 2) return;
  double total = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) total += of_warps[threadIdx.x][warp];
  squared_norms[2 * tensor + threadIdx.x] = static_cast<float>(total);
}

template <int E, class Position>
__device__ __forceinline__ void apply(const LambEntry& entry, float eps, int count,
                                      const Position& position) {
  const LambTensor& tensor = entry.tensor;
  const LambDirection direction = entry.direction;
  const float factor = entry.factor;
  Held<E> w[kSlots<E>], m[kSlots<E>], v[kSlots<E>];
  for_each_group<E>(
      count,
      [&](int slot, int i) {
        const int64_t first = position(i);
        w[slot].fetch(tensor.param, first);
        m[slot].fetch_once(tensor.exp_avg, first);
        v[slot].fetch_once(tensor.exp_avg_sq, first);
      },
      [&](int slot, int i) {
        float average[E], average_sq[E], param[E];
        m[slot].get(tensor.exp_avg.dtype, average);
        v[slot].get(tensor.exp_avg_sq.dtype, average_sq);
        w[slot].get(tensor.param.dtype, param);
#pragma unroll
        for (int k = 0; k < E; ++k) {
          param[k] -= factor * direction.of(param[k], average[k], average_sq[k], eps);
        }
        Held<E>::put(tensor.param, position(i), param);
      });
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    lamb_apply_kernel(const LambEntry* entries, int64_t count, float eps, const float* found_inf) {
  if (is_set(found_inf)) return;
  // Backwards: what update wrote last may still be in the cache.
  const int64_t chunk = gridDim.x - 1 - blockIdx.x;
  const LambEntry& entry = entry_of(entries, count, chunk);
  const LambRange range(entry, chunk);
  apply<kVector>(entry, eps, range.vectors, [&](int i) { return range.vector(i); });
  apply<1>(entry, eps, range.edges, [&](int i) { return range.edge(i); });
}

int64_t table_floats(int64_t count) { return count * int64_t{sizeof(LambEntry) / sizeof(float)}; }

LambBatch batch_of(const LambOptions& options, const float* found_inf, const float* squared_norms) {
  LambBatch batch = {};
  batch.found_inf = found_inf;
  batch.squared_norms = squared_norms;
  batch.log_beta1 = std::log(options.beta1);
  batch.log_beta2 = std::log(options.beta2);
  batch.nvlamb = options.nvlamb;
  return batch;
}

Moments moments_of(const LambUpdate& params) {
  return {
      .beta1 = static_cast<float>(params.options.beta1),
      .one_minus_beta1 = static_cast<float>(1.0 - params.options.beta1),
      .beta2 = static_cast<float>(params.options.beta2),
      .one_minus_beta2 = static_cast<float>(1.0 - params.options.beta2),
      .eps = static_cast<float>(params.options.eps),
      .grad_scale = params.grad_scale,
      .found_inf = params.found_inf,
  };
}

}  // namespace

int64_t lamb_update_workspace(const LambUpdate& params) {
  return table_floats(params.count) + 2 * chunks_of(params.tensors, params.count);
}

int64_t lamb_apply_workspace(const LambApply& params) { return table_floats(params.count); }

Error lamb_update(const LambUpdate& params, float* workspace, Stream stream) {
  if (params.count == 0) return nullptr;
  const int64_t chunks = chunks_of(params.tensors, params.count);
  LambEntry* const entries = reinterpret_cast<LambEntry*>(workspace);
  float* const partials = workspace + table_floats(params.count);
  LambBatch batch = batch_of(params.options, params.found_inf, nullptr);
  Error error = launch_table(params.tensors, params.count, batch, entries, stream);
  if (!error && chunks > 0) {
    error = launch(lamb_update_kernel, {static_cast<unsigned>(chunks), 1, 1}, {kThreads, 1, 1}, stream,
                   entries, params.count, moments_of(params), partials);
  }
  if (error) return error;
  return launch(lamb_norms_kernel, {static_cast<unsigned>(params.count), 1, 1}, {kThreads, 1, 1}, stream,
                entries, chunks, partials, params.squared_norms);
}

Error lamb_apply(const LambApply& params, float* workspace, Stream stream) {
  const int64_t chunks = chunks_of(params.tensors, params.count);
  if (chunks == 0) return nullptr;
  LambEntry* const entries = reinterpret_cast<LambEntry*>(workspace);
  LambBatch batch = batch_of(params.options, params.found_inf, params.squared_norms);
  const Error error = launch_table(params.tensors, params.count, batch, entries, stream);
  if (error) return error;
  return launch(lamb_apply_kernel, {static_cast<unsigned>(chunks), 1, 1}, {kThreads, 1, 1}, stream, entries,
                params.count, static_cast<float>(params.options.eps), params.found_inf);
}

}  // namespace evakernels::cuda
