// LAMB: one launch a phase over all tensors, whatever their number, sizes and dtypes.
//
// A block has one chunk of one tensor. Update leaves the sums of each chunk, and a small kernel adds up those
// of each tensor. The order of every addition is fixed, so two runs are bit-equal. For each element of
// float32 update moves 24 bytes and apply 16: each buffer is read once, and what changes is written once.
#include <cmath>

#include "cuda/tensor_chunks.cuh"
#include "include/lamb.h"

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

// partials is [chunks, 2].
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

// A block has one tensor.
struct LambNorms {
  LambEntry* entries;
  int64_t count;
  int64_t chunks;
  const float* partials;
  float* squared_norms;
  bool sets_factors;  // for apply
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
    lamb_apply_kernel(const LambEntry* entries, int64_t count, float eps, const float* found_inf) {
  if (is_set(found_inf)) return;
  // Backwards: what update wrote last may still be in the cache.
  const int64_t chunk = int64_t{gridDim.x} - 1 - blockIdx.x;
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

StepOptions step_options(const LambOptions& options, const float* grad_scale, const float* found_inf) {
  return {moment_rates(options.beta1, options.beta2), static_cast<float>(options.eps), grad_scale, found_inf};
}

// Moments, step counts and norms; `entries` is the table. squared_norms: where the norms go; null: behind the
// partial sums, and the table gets apply's factors.
Error update(const LambStep& step, float* squared_norms, Scratch& scratch, Stream stream,
             LambEntry** entries) {
  const int64_t chunks = chunks_of(step.tensors, step.count), sums = 2 * chunks;
  const LambRule rule = rule_of(step.options, step.found_inf, nullptr);
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

// Params: LambApply or LambStep, whose table is in `entries`.
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
  const LambRule rule = rule_of(params.options, params.found_inf, params.squared_norms);
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
