// AdamW: one launch over all tensors, whatever their number, sizes, dtypes, rates and decays.
//
// A block has one chunk of one tensor. Each buffer is read once, and all but the gradient are written once:
// 28 bytes for each element of float32.
#include <cmath>

#include "cuda/adamw.h"
#include "cuda/tensor_chunks.cuh"

namespace evakernels::cuda {
namespace {

// w = kept w - rate m / (sqrt(v) v_factor + eps)
struct AdamwEntry : TableEntry {
  float kept;
  float rate;
  float v_factor;
  RoundingKey rounding;
};

struct AdamwRule {
  using Entry = AdamwEntry;

  const float* found_inf;
  double log_beta1;
  double log_beta2;

  __device__ __forceinline__ void complete(AdamwEntry& entry, int64_t) const {
    const OptimizedTensor& tensor = entry.tensor;
    const float step = count_step(tensor.step, found_inf);
    entry.kept = static_cast<float>(1.0 - tensor.lr * tensor.weight_decay);
    entry.rate = static_cast<float>(tensor.lr / bias_of(log_beta1, step));
    entry.v_factor = static_cast<float>(1.0 / sqrt(bias_of(log_beta2, step)));
    entry.rounding = key_of(tensor.rounding, step);
  }
};

template <int E, class Position>
__device__ __forceinline__ void update(const AdamwEntry& entry, const StepOptions& options, float grad_factor,
                                       int count, const Position& position) {
  const OptimizedTensor& tensor = entry.tensor;
  const RoundingKey rounding = entry.rounding;
  Held<E> w[kSlots<E>], g[kSlots<E>], m[kSlots<E>], v[kSlots<E>];
  for_each_group<E>(
      count,
      [&](int slot, int i) {
        const int64_t first = position(i);
        w[slot].fetch_once(tensor.param, first);
        g[slot].fetch_once(tensor.grad, first);
        m[slot].fetch_once(tensor.exp_avg, first);
        v[slot].fetch_once(tensor.exp_avg_sq, first);
      },
      [&](int slot, int i) {
        float param[E], gradient[E], average[E], average_sq[E];
        w[slot].get(tensor.param.dtype, param);
        g[slot].get(tensor.grad.dtype, gradient);
        m[slot].get(tensor.exp_avg.dtype, average);
        v[slot].get(tensor.exp_avg_sq.dtype, average_sq);
#pragma unroll
        for (int k = 0; k < E; ++k) {
          options.change_moments(gradient[k] * grad_factor, average[k], average_sq[k]);
          const float denominator = sqrtf(average_sq[k]) * entry.v_factor + options.eps;
          param[k] = param[k] * entry.kept - entry.rate * (average[k] / denominator);
        }
        round_by(rounding, position(i), param);
        Held<E>::put(tensor.param, position(i), param);
        Held<E>::put(tensor.exp_avg, position(i), average);
        Held<E>::put(tensor.exp_avg_sq, position(i), average_sq);
      });
}

// Four buffers under way take more registers than four blocks leave to each thread; three are enough to hide
// the latency of the memory.
constexpr int kAdamwBlocks = 3;

__global__ void __launch_bounds__(kThreads, kAdamwBlocks)
    adamw_update_kernel(const AdamwEntry* entries, int64_t count, const StepOptions options) {
  if (is_set(options.found_inf)) return;
  const AdamwEntry& entry = entry_of(entries, count, blockIdx.x);
  const ChunkRange range(entry, blockIdx.x);
  const float grad_factor = options.factor_of_gradients();
  update<kVector>(entry, options, grad_factor, range.vectors, [&](int i) { return range.vector(i); });
  update<1>(entry, options, grad_factor, range.edges, [&](int i) { return range.edge(i); });
}

}  // namespace

Error adamw_update(const AdamwUpdate& params, Scratch& scratch, Stream stream) {
  const AdamwRule rule = {
      .found_inf = params.found_inf,
      .log_beta1 = std::log(params.beta1),
      .log_beta2 = std::log(params.beta2),
  };
  AdamwEntry* entries = nullptr;
  const Error error = write_table(params, rule, 0, scratch, stream, &entries);
  const int64_t chunks = chunks_of(params.tensors, params.count);
  if (error || chunks == 0) return error;
  const StepOptions options = {moment_rates(params.beta1, params.beta2), static_cast<float>(params.eps),
                               params.grad_scale, params.found_inf};
  return launch(adamw_update_kernel, {static_cast<unsigned>(chunks), 1, 1}, {kThreads, 1, 1}, stream, entries,
                params.count, options);
}

}  // namespace evakernels::cuda
