// LAMB: one launch per phase for all tensors, of any number, sizes and dtypes.
//
// Grid: one block per chunk of a tensor. The update phase leaves partial norms per chunk, which a small
// kernel adds up per tensor in a fixed order: no atomics. Table: the tensors reach the device as arguments of
// small kernels that write them to scratch memory. The host neither waits for a copy nor keeps memory alive
// for one, and a captured graph owns its arguments. The same kernels compute what depends on step counts,
// norms and flags, which the host doesn't know. Dtypes: four buffers of three dtypes would make 81 instances
// of a kernel, so each access branches on the dtype in the table, uniformly over a block. Threads read
// pointers and dtypes from the table each time: from a copy the compiler would make 81 loops after all.
// Traffic: 24 bytes per float32 element in update and 16 in apply.
#include <cmath>

#include "cuda/norm_rows.cuh"
#include "include/lamb.h"

namespace evakernels::cuda {
namespace {

// --- table ---

constexpr int64_t kChunk = 8192;  // elements per block, and per partial norm
constexpr int kVector = 4;        // elements per access: 16 bytes of float32, 8 of 16-bit types
constexpr int kNoVectors = -1;

struct TableItem {
  OptimizedTensor tensor;
  int64_t first_chunk;  // counted over all tensors
};

constexpr size_t kArgumentBytes = 32764;  // of a kernel, from kOldestDriver on
constexpr int kOldestDriver = 12010;
constexpr size_t kBatchSize = (kArgumentBytes - 128) / sizeof(TableItem);

__device__ __forceinline__ bool is_set(const float* found_inf) { return found_inf && load(found_inf) > 0.0f; }

// 1 - beta^step, to full precision also for beta close to 1.
__device__ __forceinline__ double bias_of(double log_beta, float step) { return -expm1(step * log_beta); }

// Increments and returns the step count, unless found_inf is set.
__device__ __forceinline__ float count_step(float* step, const float* found_inf) {
  const float made = load(step);
  if (is_set(found_inf)) return made;
  store(step, made + 1.0f);
  return made + 1.0f;
}

// u = m_scale m / (sqrt(v_scale v) + eps) + weight_decay w
struct LambDirection {
  float m_scale;
  float v_scale;
  float weight_decay;

  __device__ __forceinline__ float of(float w, float m, float v, float eps) const {
    return m * m_scale / (sqrtf(v * v_scale) + eps) + w * weight_decay;
  }
};

// A tensor in the table on the device.
struct LambEntry {
  OptimizedTensor tensor;
  int64_t first_chunk;
  int head;  // elements before the first aligned vector; kNoVectors if the buffers differ in it
  LambDirection direction;
  float factor;  // of u in the step
  RoundingKey rounding;
};

// Step size: learning rate * trust ratio * bias correction.
__device__ __forceinline__ double factor_of(double lr, double weight_decay, const float* squared_norms,
                                            bool nvlamb, double bias1, double bias2) {
  const double param = sqrtf(squared_norms[0]), direction = sqrtf(squared_norms[1]);
  const double ratio = param > 0.0 && direction > 0.0 ? param / direction : 1.0;
  if (nvlamb) return weight_decay != 0.0 ? lr * ratio : lr;
  // Unlike fmin and fmax, keeps NaN.
  const double clipped = ratio < kLowestRatio ? kLowestRatio : ratio > kHighestRatio ? kHighestRatio : ratio;
  return lr * clipped * sqrt(bias2) / bias1;
}

struct LambRule {
  const float* found_inf;
  const float* squared_norms;  // null: the phase is update, which counts the step
  const float* lrs;            // null: those of the tensors
  double log_beta1;
  double log_beta2;
  bool nvlamb;

  __device__ __forceinline__ void complete(LambEntry& entry, int64_t position) const {
    const OptimizedTensor& tensor = entry.tensor;
    const float step = squared_norms ? load(tensor.step) : count_step(tensor.step, found_inf);
    const double bias1 = bias_of(log_beta1, step), bias2 = bias_of(log_beta2, step);
    entry.direction.m_scale = nvlamb ? static_cast<float>(1.0 / bias1) : 1.0f;
    entry.direction.v_scale = nvlamb ? static_cast<float>(1.0 / bias2) : 1.0f;
    entry.direction.weight_decay = static_cast<float>(tensor.weight_decay);
    entry.rounding = key_of(tensor.rounding, step);
    entry.factor = squared_norms ? factor(tensor, position, step, squared_norms + 2 * position) : 0.0f;
  }

  // `step`: count including this step.
  __device__ __forceinline__ float factor(const OptimizedTensor& tensor, int64_t position, float step,
                                          const float* norms) const {
    const double lr = lrs ? load(lrs + position) : tensor.lr;
    return static_cast<float>(factor_of(lr, tensor.weight_decay, norms, nvlamb, bias_of(log_beta1, step),
                                        bias_of(log_beta2, step)));
  }
};

// As many tensors as the arguments of one kernel hold.
struct TableBatch {
  LambRule rule;
  int64_t first;
  TableItem items[kBatchSize];
};

__device__ __forceinline__ int head_of(const TensorBuffer& buffer) {
  const unsigned bytes = buffer.dtype == DType::Float32 ? 4 : 2;
  const unsigned beyond = static_cast<unsigned>(reinterpret_cast<uintptr_t>(buffer.data) / bytes % kVector);
  return static_cast<int>((kVector - beyond) % kVector);
}

// Elements before the first aligned vector, if all buffers agree.
__device__ __forceinline__ int common_head(const OptimizedTensor& tensor) {
  const TensorBuffer buffers[] = {tensor.param, tensor.grad, tensor.exp_avg, tensor.exp_avg_sq};
  int head = kNoVectors;
  bool common = true;
#pragma unroll
  for (const TensorBuffer& buffer : buffers) {
    if (!buffer.data) continue;
    common = common && (head == kNoVectors || head == head_of(buffer));
    head = head_of(buffer);
  }
  return common ? head : kNoVectors;  // #common-head
}

// One thread per block, so that a warp reads one argument from constant memory at a time.
__global__ void __launch_bounds__(1)
    lamb_table_kernel(const __grid_constant__ TableBatch batch, LambEntry* entries) {
  const TableItem& item = batch.items[blockIdx.x];
  const int64_t position = batch.first + blockIdx.x;
  LambEntry entry;
  entry.tensor = item.tensor;
  entry.first_chunk = item.first_chunk;
  entry.head = common_head(item.tensor);
  batch.rule.complete(entry, position);
  entries[position] = entry;
}

// Binary search for the tensor of a chunk. An empty tensor shares the first chunk of its successor.
__device__ __forceinline__ const LambEntry& entry_of(const LambEntry* entries, int64_t count, int64_t chunk) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (entries[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return entries[low];
}

// The elements of a chunk: aligned vectors, and single elements before and after them.
struct ChunkRange {
  int64_t begin;
  int64_t first_vector;
  int vectors;
  int head;
  int edges;

  __device__ __forceinline__ ChunkRange(const LambEntry& entry, int64_t chunk)
      : begin((chunk - entry.first_chunk) * kChunk) {
    const int64_t left = entry.tensor.size - begin;
    const int size = static_cast<int>(left < kChunk ? left : kChunk);
    head = entry.head == kNoVectors || entry.head > size ? size : entry.head;
    first_vector = begin + head;
    vectors = (size - head) / kVector;
    edges = size - vectors * kVector;  // #edges
  }

  __device__ __forceinline__ int64_t vector(int i) const { return first_vector + int64_t{i} * kVector; }
  __device__ __forceinline__ int64_t edge(int i) const {
    return begin + i + (i < head ? 0 : vectors * kVector);
  }
};

int64_t chunks_of(const OptimizedTensor& tensor) { return ceil_div(tensor.size, kChunk); }

int64_t chunks_of(const OptimizedTensor* tensors, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(tensors[i]);
  return chunks;
}

Error check_driver() {
  const int driver = driver_version();
  if (driver == 0 || driver >= kOldestDriver) return nullptr;
  return "the driver is too old for 32 KB of kernel arguments; it takes one for CUDA 12.1 or later (530)";
}

// Allocates the table of params.tensors, followed by `floats`, and writes it.
template <class Params>
Error write_table(const Params& params, const LambRule& rule, int64_t floats, Scratch& scratch, Stream stream,
                  LambEntry** entries) {
  static_assert(sizeof(TableBatch) + sizeof *entries <= kArgumentBytes);
  if (const Error error = check_driver()) return error;
  const int64_t size = params.count * int64_t{sizeof **entries / sizeof(float)} + floats;
  if (const Error error = scratch.allocate(reinterpret_cast<float**>(entries), size)) return error;
  TableBatch batch;
  batch.rule = rule;
  int64_t chunk = 0;
  for (batch.first = 0; batch.first < params.count; batch.first += kBatchSize) {
    const int64_t left = params.count - batch.first;
    const unsigned size = static_cast<unsigned>(left < int64_t{kBatchSize} ? left : kBatchSize);
    for (unsigned i = 0; i < size; ++i) {
      batch.items[i] = {params.tensors[batch.first + i], chunk};
      chunk += chunks_of(batch.items[i].tensor);
    }
    const Error error = launch(lamb_table_kernel, {size, 1, 1}, {1, 1, 1}, stream, batch, *entries);
    if (error) return error;
  }
  return nullptr;
}

// --- chunks ---

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocks = 4;  // minimum per SM

// Vectors in flight per thread and buffer.
template <int E>
constexpr int kSlots = E == 1 ? 4 : 2;

template <class T>
__device__ __forceinline__ T* at(const TensorBuffer& buffer, int64_t first) {
  return static_cast<T*>(buffer.data) + first;
}

// E elements of a buffer in their memory format; 16-bit types fill the first half.
template <int E>
class Held {
 public:
  __device__ __forceinline__ void fetch(const TensorBuffer& buffer, int64_t first) {
    if (buffer.dtype == DType::Float32) {
      hold(Packed<float, E>::load(assume_global(at<const float>(buffer, first))));
    } else {
      hold(Packed<BFloat16, E>::load(assume_global(at<const BFloat16>(buffer, first))));
    }
  }

  // Evict-first, for buffers that aren't read again soon.
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

  // Stores the values and rounds them to the buffer's dtype.
  static __device__ __forceinline__ void put(const TensorBuffer& buffer, int64_t first, float (&values)[E]) {
    with_element_type(buffer.dtype, [&](auto type) {
      using T = decltype(type);
      const auto packed = Packed<T, E>::pack(values);
      packed.store_vector(at<T>(buffer, first));
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

// Rounds elements from `first` on to bfloat16 stochastically, if there is a seed.
template <int E>
__device__ __forceinline__ void round_by(const RoundingKey& rounding, int64_t first, float (&values)[E]) {
  if (!rounding.is_stochastic) return;
#pragma unroll
  for (int k = 0; k < E; ++k) {
    values[k] = rounded_to_bfloat16(values[k], random_bits(rounding, static_cast<uint32_t>(first) + k));
  }
}

// Calls fetch(slot, i) for this thread's next kSlots indices i < count, then use(slot, i) for the same.
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

// Options common to all tensors of a step.
struct StepOptions {
  MomentRates rates;
  float eps;
  const float* grad_scale;
  const float* found_inf;

  // Multiplies by the reciprocal, which is exact for powers of two.
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

// Adds N interleaved partial sums over [first, last) with all threads of a block, in double as there may be
// thousands; thread n < N returns the n-th total.
template <int N>
__device__ __forceinline__ float total_of(const float* partials, int64_t first, int64_t last) {
  double sums[N] = {};
  for (int64_t chunk = first + threadIdx.x; chunk < last; chunk += kThreads) {
    for (int n = 0; n < N; ++n) sums[n] += load_once(partials + N * chunk + n);
  }
  double (&of_warps)[N][kWarps] = shared_memory<TotalScratch<N>>().sums;
  for (int n = 0; n < N; ++n) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sums[n] += __shfl_xor_sync(kFullMask, sums[n], distance);
    }
    if (threadIdx.x % kWarpSize == 0) of_warps[n][threadIdx.x / kWarpSize] = sums[n];
  }
  __syncthreads();  // #total
  if (threadIdx.x >= N) return 0.0f;
  double total = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) total += of_warps[threadIdx.x][warp];
  return static_cast<float>(total);
}

// --- kernels ---

// changes: whether the moments are updated.
template <int E, class Position>
__device__ __forceinline__ void update(const LambEntry& entry, const StepOptions& options, bool changes,
                                       float grad_factor, int count, const Position& position,
                                       float (&sums)[2]) {
  const OptimizedTensor& tensor = entry.tensor;
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
            options.change_moments(gradient[k] * grad_factor, average[k], average_sq[k]);
          }
          Held<E>::put(tensor.exp_avg, position(i), average);
          Held<E>::put(tensor.exp_avg_sq, position(i), average_sq);
        }
        w[slot].get(tensor.param.dtype, param);
#pragma unroll
        for (int k = 0; k < E; ++k) {
          const float u = direction.of(param[k], average[k], average_sq[k], options.eps);
          sums[0] += param[k] * param[k];
          sums[1] += u * u;
        }
      });
}

// partials: [chunks, 2].
__global__ void __launch_bounds__(kThreads, kBlocks)
    lamb_update_kernel(const LambEntry* entries, int64_t count, const StepOptions options, float* partials) {
  const int64_t chunk = blockIdx.x;
  const LambEntry& entry = entry_of(entries, count, chunk);
  const ChunkRange range(entry, chunk);
  const bool changes = !is_set(options.found_inf);
  const float grad_factor = options.factor_of_gradients();
  float sums[2] = {0.0f, 0.0f};
  update<kVector>(
      entry, options, changes, grad_factor, range.vectors, [&](int i) { return range.vector(i); }, sums);
  update<1>(entry, options, changes, grad_factor, range.edges, [&](int i) { return range.edge(i); }, sums);
  RowSums sum_over_block;
  sum_over_block(sums);
  if (threadIdx.x > 0) return;
  partials[2 * chunk] = sums[0];
  partials[2 * chunk + 1] = sums[1];
}

// One block per tensor.
struct LambNorms {
  LambEntry* entries;
  int64_t count;
  int64_t chunks;
  const float* partials;
  float* squared_norms;
  bool sets_factors;  // sets the entries' step size for apply
};

__global__ void __launch_bounds__(kThreads) lamb_norms_kernel(const LambNorms norms, const LambRule rule) {
  const int64_t tensor = blockIdx.x;
  LambEntry& entry = norms.entries[tensor];
  const int64_t last = tensor + 1 < norms.count ? norms.entries[tensor + 1].first_chunk : norms.chunks;
  const float total = total_of<2>(norms.partials, entry.first_chunk, last);
  float* const of_tensor = norms.squared_norms + 2 * tensor;
  if (threadIdx.x < 2) of_tensor[threadIdx.x] = total;
  if (!norms.sets_factors) return;
  __syncthreads();
  if (threadIdx.x == 0) entry.factor = rule.factor(entry.tensor, tensor, load(entry.tensor.step), of_tensor);
}

template <int E, class Position>
__device__ __forceinline__ void apply(const LambEntry& entry, float eps, int count,
                                      const Position& position) {
  const OptimizedTensor& tensor = entry.tensor;
  const LambDirection direction = entry.direction;
  const float factor = entry.factor;
  const RoundingKey rounding = entry.rounding;
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
          param[k] -= factor * direction.of(param[k], average[k], average_sq[k], eps);  // #step
        }
        round_by(rounding, position(i), param);
        Held<E>::put(tensor.param, position(i), param);
      });
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    lamb_apply_kernel(const LambEntry* entries, int64_t count, float eps, const float* found_inf) {
  if (is_set(found_inf)) return;
  // In reverse order: what update wrote last may still be cached.
  const int64_t chunk = int64_t{gridDim.x} - 1 - blockIdx.x;
  const LambEntry& entry = entry_of(entries, count, chunk);
  const ChunkRange range(entry, chunk);
  apply<kVector>(entry, eps, range.vectors, [&](int i) { return range.vector(i); });
  apply<1>(entry, eps, range.edges, [&](int i) { return range.edge(i); });
}

LambRule rule_of(const LambOptions& options, const float* found_inf, const float* squared_norms,
                 const float* lrs) {
  return {
      .found_inf = found_inf,
      .squared_norms = squared_norms,
      .lrs = lrs,
      .log_beta1 = std::log1p(options.beta1 - 1.0),
      .log_beta2 = std::log1p(options.beta2 - 1.0),
      .nvlamb = options.nvlamb,
  };
}

StepOptions step_options(const LambOptions& options, const float* grad_scale, const float* found_inf) {
  return {moment_rates(options.beta1, options.beta2), static_cast<float>(options.eps), grad_scale, found_inf};
}

// Update phase: moments, step counts and norms. squared_norms: null to keep them in scratch memory and to set
// apply's step sizes in the table, which `entries` returns.
Error update(const LambStep& step, float* squared_norms, Scratch& scratch, Stream stream,
             LambEntry** entries) {
  const int64_t chunks = chunks_of(step.tensors, step.count), sums = 2 * chunks;
  const LambRule rule = rule_of(step.options, step.found_inf, nullptr, step.lrs);
  const int64_t floats = sums + (squared_norms ? 0 : 2 * step.count);
  Error error = write_table(step, rule, floats, scratch, stream, entries);
  float* const partials = reinterpret_cast<float*>(*entries + step.count);
  if (!error && chunks > 0) {
    error =
        launch(lamb_update_kernel, {static_cast<unsigned>(chunks), 1, 1}, {kThreads, 1, 1}, stream, *entries,
               step.count, step_options(step.options, step.grad_scale, step.found_inf), partials);
  }
  if (error) return error;
  const LambNorms norms = {
      .entries = *entries,
      .count = step.count,
      .chunks = chunks,
      .partials = partials,
      .squared_norms = squared_norms ? squared_norms : partials + sums,
      .sets_factors = !squared_norms,
  };
  return launch(lamb_norms_kernel, {static_cast<unsigned>(step.count), 1, 1}, {kThreads, 1, 1}, stream, norms,
                rule);
}

// Apply phase of LambApply or LambStep.
template <class Params>
Error apply(const Params& params, const LambEntry* entries, Stream stream) {
  const int64_t chunks = chunks_of(params.tensors, params.count);
  if (chunks == 0) return nullptr;
  return launch(lamb_apply_kernel, {static_cast<unsigned>(chunks), 1, 1}, {kThreads, 1, 1}, stream, entries,
                params.count, static_cast<float>(params.options.eps), params.found_inf);
}

}  // namespace

Error lamb_update(const LambUpdate& params, Scratch& scratch, Stream stream) {
  if (params.count == 0) return nullptr;
  const LambStep step = {params.tensors, params.count, params.options, params.grad_scale, params.found_inf};
  LambEntry* entries = nullptr;
  return update(step, params.squared_norms, scratch, stream, &entries);
}

Error lamb_apply(const LambApply& params, Scratch& scratch, Stream stream) {
  const LambRule rule = rule_of(params.options, params.found_inf, params.squared_norms, params.lrs);
  LambEntry* entries = nullptr;
  const Error error = write_table(params, rule, 0, scratch, stream, &entries);
  return error ? error : apply(params, entries, stream);
}

Error lamb_step(const LambStep& params, Scratch& scratch, Stream stream) {
  if (params.count == 0) return nullptr;
  LambEntry* entries = nullptr;
  const Error error = update(params, nullptr, scratch, stream, &entries);
  return error ? error : apply(params, entries, stream);
}

}  // namespace evakernels::cuda
