// LAMB: one launch a phase over all tensors, whatever their number, sizes and dtypes.
//
// A block has one chunk of one tensor. Update leaves the sums of each chunk, and a small kernel adds up those
// of each tensor. The order of every addition is fixed, so two runs are bit-equal. For each element of
// float32 update moves 24 bytes and apply 16: each buffer is read once, and what changes is written once.
#include <cmath>

#include "common/lamb.h"
#include "cuda/lamb.h"
#include "cuda/tensor_chunks.cuh"

namespace evakernels::cuda {
namespace {

// u = m_scale m / (sqrt(v_scale v) + eps) + weight_decay w
struct LambDirection {
  float m_scale;
  float v_scale;
  float weight_decay;

  __device__ __forceinline__ float of(float w, float m, float v, float eps) const {
    return m * m_scale / (sqrtf(v * v_scale) + eps) + w * weight_decay;
  }
};

struct LambEntry : TableEntry {
  LambDirection direction;
  float factor;  // of u in the step
  RoundingKey rounding;
};

// What u is multiplied with: the rate, the trust ratio, and the bias correction.
__device__ __forceinline__ double factor_of(const OptimizedTensor& tensor, const float* squared_norms,
                                            bool nvlamb, double bias1, double bias2) {
  const double param = sqrtf(squared_norms[0]), direction = sqrtf(squared_norms[1]);
  const double ratio = param > 0.0 && direction > 0.0 ? param / direction : 1.0;
  if (nvlamb) return tensor.weight_decay != 0.0 ? tensor.lr * ratio : tensor.lr;
  // Not by fmin and fmax, which would lose a NaN.
  const double clipped = ratio < kLowestRatio ? kLowestRatio : ratio > kHighestRatio ? kHighestRatio : ratio;
  return tensor.lr * clipped * sqrt(bias2) / bias1;
}

struct LambRule {
  using Entry = LambEntry;

  const float* found_inf;
  const float* squared_norms;  // null: the phase is update, which counts the step
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
    entry.factor = squared_norms ? factor(tensor, step, squared_norms + 2 * position) : 0.0f;
  }

  // `step`: with the one that is being made.
  __device__ __forceinline__ float factor(const OptimizedTensor& tensor, float step,
                                          const float* norms) const {
    return static_cast<float>(
        factor_of(tensor, norms, nvlamb, bias_of(log_beta1, step), bias_of(log_beta2, step)));
  }
};

// `changes`: else the moments stay as they are.
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

// Chunks from `first` on. partials is [chunks, 2].
__global__ void __launch_bounds__(kThreads, kBlocks)
    lamb_update_kernel(const LambEntry* entries, int64_t count, const StepOptions options, float* partials,
                       int64_t first) {
  const int64_t chunk = first + blockIdx.x;
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

// A block has one tensor, of those from `first_tensor` on.
struct LambNorms {
  LambEntry* entries;
  int64_t count;
  int64_t chunks;
  const float* partials;
  float* squared_norms;
  bool sets_factors;  // for apply
};

__global__ void __launch_bounds__(kThreads)
    lamb_norms_kernel(const LambNorms norms, const LambRule rule, int64_t first_tensor) {
  const int64_t tensor = first_tensor + blockIdx.x;
  LambEntry& entry = norms.entries[tensor];
  const int64_t last = tensor + 1 < norms.count ? norms.entries[tensor + 1].first_chunk : norms.chunks;
  const float total = total_of<2>(norms.partials, entry.first_chunk, last);
  float* const of_tensor = norms.squared_norms + 2 * tensor;
  if (threadIdx.x < 2) of_tensor[threadIdx.x] = total;
  if (!norms.sets_factors) return;
  __syncthreads();
  if (threadIdx.x == 0) entry.factor = rule.factor(entry.tensor, load(entry.tensor.step), of_tensor);
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
          param[k] -= factor * direction.of(param[k], average[k], average_sq[k], eps);
        }
        round_by(rounding, position(i), param);
        Held<E>::put(tensor.param, position(i), param);
      });
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    lamb_apply_kernel(const LambEntry* entries, int64_t count, float eps, const float* found_inf,
                      int64_t first) {
  if (is_set(found_inf)) return;
  // Backwards: what update wrote last may still be in the cache.
  const int64_t chunk = first + gridDim.x - 1 - blockIdx.x;
  const LambEntry& entry = entry_of(entries, count, chunk);
  const ChunkRange range(entry, chunk);
  apply<kVector>(entry, eps, range.vectors, [&](int i) { return range.vector(i); });
  apply<1>(entry, eps, range.edges, [&](int i) { return range.edge(i); });
}

LambRule rule_of(const LambOptions& options, const float* found_inf, const float* squared_norms) {
  return {
      .found_inf = found_inf,
      .squared_norms = squared_norms,
      .log_beta1 = std::log(options.beta1),
      .log_beta2 = std::log(options.beta2),
      .nvlamb = options.nvlamb,
  };
}

// Tensors [first, last), whose chunks are [first_chunk, last_chunk).
struct TensorGroup {
  int64_t first, last;
  int64_t first_chunk, last_chunk;

  dim3 tensor_grid() const { return {static_cast<unsigned>(last - first), 1, 1}; }
  dim3 chunk_grid() const { return {static_cast<unsigned>(last_chunk - first_chunk), 1, 1}; }
};

// The next tensors whose parameters and moments are `most` bytes together, or a larger one alone.
TensorGroup next_group(const OptimizedTensor* tensors, int64_t count, const TensorGroup& before,
                       size_t most) {
  TensorGroup group = {before.last, before.last, before.last_chunk, before.last_chunk};
  size_t bytes = 0;
  for (; group.last < count; ++group.last) {
    const OptimizedTensor& tensor = tensors[group.last];
    for (const TensorBuffer& buffer : {tensor.param, tensor.exp_avg, tensor.exp_avg_sq}) {
      bytes += tensor.size * (buffer.dtype == DType::Float32 ? 4 : 2);
    }
    if (bytes > most && group.last > group.first) break;
    group.last_chunk += chunks_of(tensor);
  }
  return group;
}

StepOptions step_options(const LambOptions& options, const float* grad_scale, const float* found_inf) {
  return {moment_rates(options.beta1, options.beta2), static_cast<float>(options.eps), grad_scale, found_inf};
}

// What the kernels of a call have in common, and their launches over a group of tensors.
class LambLaunches {
 public:
  // squared_norms: for apply alone; else null.
  LambLaunches(const LambStep& step, const float* squared_norms, Stream stream)
      : step_(step),
        rule_(rule_of(step.options, step.found_inf, squared_norms)),
        options_(step_options(step.options, step.grad_scale, step.found_inf)),
        stream_(stream) {
    norms_.count = step.count;
    norms_.chunks = chunks_of(step.tensors, step.count);
  }

  // Writes the table, for apply alone.
  Error prepare(Scratch& scratch) { return prepare(scratch, 0); }

  // The same, with partial sums for update. squared_norms: where the norms go; null: nobody but apply reads
  // them.
  Error prepare_update(Scratch& scratch, float* squared_norms) {
    norms_.sets_factors = !squared_norms;
    const int64_t partials = 2 * norms_.chunks;
    if (const Error error = prepare(scratch, partials + (squared_norms ? 0 : 2 * norms_.count))) return error;
    partials_ = reinterpret_cast<float*>(norms_.entries + norms_.count);
    norms_.partials = partials_;
    norms_.squared_norms = squared_norms ? squared_norms : partials_ + partials;
    return nullptr;
  }

  TensorGroup all() const { return {0, norms_.count, 0, norms_.chunks}; }

  Error update(const TensorGroup& group) const {
    Error error = nullptr;
    if (group.last_chunk > group.first_chunk) {
      error = launch(lamb_update_kernel, group.chunk_grid(), {kThreads, 1, 1}, stream_, norms_.entries,
                     norms_.count, options_, partials_, group.first_chunk);
    }
    if (error) return error;
    return launch(lamb_norms_kernel, group.tensor_grid(), {kThreads, 1, 1}, stream_, norms_, rule_,
                  group.first);
  }

  Error apply(const TensorGroup& group) const {
    if (group.last_chunk == group.first_chunk) return nullptr;
    return launch(lamb_apply_kernel, group.chunk_grid(), {kThreads, 1, 1}, stream_, norms_.entries,
                  norms_.count, options_.eps, options_.found_inf, group.first_chunk);
  }

 private:
  Error prepare(Scratch& scratch, int64_t floats) {
    return write_table(step_, rule_, floats, scratch, stream_, &norms_.entries);
  }

  LambStep step_;
  LambRule rule_;
  StepOptions options_;
  Stream stream_;
  LambNorms norms_ = {};
  float* partials_ = nullptr;
};

}  // namespace

Error lamb_update(const LambUpdate& params, Scratch& scratch, Stream stream) {
  if (params.count == 0) return nullptr;
  const LambStep step = {params.tensors, params.count, params.options, params.grad_scale, params.found_inf};
  LambLaunches launches(step, nullptr, stream);
  const Error error = launches.prepare_update(scratch, params.squared_norms);
  return error ? error : launches.update(launches.all());
}

Error lamb_apply(const LambApply& params, Scratch& scratch, Stream stream) {
  if (chunks_of(params.tensors, params.count) == 0) return nullptr;
  const LambStep step = {params.tensors, params.count, params.options, nullptr, params.found_inf};
  LambLaunches launches(step, params.squared_norms, stream);
  const Error error = launches.prepare(scratch);
  return error ? error : launches.apply(launches.all());
}

Error lamb_step(const LambStep& params, Scratch& scratch, Stream stream) {
  if (params.count == 0) return nullptr;
  LambLaunches launches(params, nullptr, stream);
  if (const Error error = launches.prepare_update(scratch, nullptr)) return error;
  TensorGroup group = {};
  while (group.last < params.count) {
    group = next_group(params.tensors, params.count, group, cache_size() / 2);
    Error error = launches.update(group);
    if (!error) error = launches.apply(group);
    if (error) return error;
  }
  return nullptr;
}

}  // namespace evakernels::cuda
