#include "include/lamb.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/isa.h"
#include "cpu/tensor_chunks.h"

namespace evakernels::cpu {
namespace {

const LambKernels& kernels_for(Isa isa) { return EVAKERNELS_OF_ISA(isa, lamb); }

LambDirection direction_of(const OptimizedTensor& tensor, const LambOptions& options) {
  return {
      .m_scale = options.nvlamb ? static_cast<float>(1.0 / bias_of(options.beta1, tensor)) : 1.0f,
      .v_scale = options.nvlamb ? static_cast<float>(1.0 / bias_of(options.beta2, tensor)) : 1.0f,
      .eps = static_cast<float>(options.eps),
      .weight_decay = static_cast<float>(tensor.weight_decay),
  };
}

std::vector<LambDirection> directions_of(const OptimizedTensor* tensors, int64_t count,
                                         const LambOptions& options) {
  std::vector<LambDirection> directions;
  directions.reserve(count);
  for (int64_t i = 0; i < count; ++i) directions.push_back(direction_of(tensors[i], options));
  return directions;
}

// What the direction is multiplied with: the rate, the trust ratio, and the bias correction.
double factor_of(const OptimizedTensor& tensor, const LambOptions& options, const float* squared_norms) {
  const double param = std::sqrt(squared_norms[0]), direction = std::sqrt(squared_norms[1]);
  const double ratio = param > 0 && direction > 0 ? param / direction : 1.0;
  if (options.nvlamb) return tensor.weight_decay != 0 ? tensor.lr * ratio : tensor.lr;
  const double correction = std::sqrt(bias_of(options.beta2, tensor)) / bias_of(options.beta1, tensor);
  return tensor.lr * correction * std::clamp(ratio, kLowestRatio, kHighestRatio);
}

}  // namespace

void lamb_update(const LambUpdate& params, Isa isa, ParallelFor parallel_for) {
  const LambKernels& kernels = kernels_for(isa);
  const LambMoments moments = {moment_rates(params.options.beta1, params.options.beta2),
                               factor_of_gradients(params.grad_scale)};
  const bool skip = is_set(params.found_inf);
  if (!skip) count_steps(params.tensors, params.count);
  const std::vector<LambDirection> directions = directions_of(params.tensors, params.count, params.options);
  const Chunks chunks(params.tensors, params.count);
  std::vector<LambSquaredNorms> partial(chunks.count());
  chunks.for_each(parallel_for, [&](int64_t tensor, int64_t chunk, int64_t begin, int64_t end) {
    partial[chunk] =
        kernels.update(params.tensors[tensor], skip ? nullptr : &moments, directions[tensor], begin, end);
  });
  for (int64_t i = 0; i < params.count; ++i) {
    LambSquaredNorms total = {};
    for (int64_t chunk = chunks.first_of(i); chunk < chunks.first_of(i + 1); ++chunk) {
      total.param += partial[chunk].param;
      total.direction += partial[chunk].direction;
    }
    params.squared_norms[2 * i] = static_cast<float>(total.param);
    params.squared_norms[2 * i + 1] = static_cast<float>(total.direction);
  }
}

void lamb_apply(const LambApply& params, Isa isa, ParallelFor parallel_for) {
  if (is_set(params.found_inf)) return;
  const LambKernels& kernels = kernels_for(isa);
  const std::vector<LambDirection> directions = directions_of(params.tensors, params.count, params.options);
  std::vector<float> factors(params.count);
  for (int64_t i = 0; i < params.count; ++i) {
    factors[i] =
        static_cast<float>(factor_of(params.tensors[i], params.options, params.squared_norms + 2 * i));
  }
  const Chunks chunks(params.tensors, params.count);
  chunks.for_each(parallel_for, [&](int64_t tensor, int64_t, int64_t begin, int64_t end) {
    const OptimizedTensor& optimized = params.tensors[tensor];
    const RoundingKey rounding = key_of(optimized.rounding, *optimized.step);
    kernels.apply(optimized, directions[tensor], factors[tensor], rounding, begin, end);
  });
}

void lamb_step(const LambStep& params, Isa isa, ParallelFor parallel_for) {
  std::vector<float> squared_norms(2 * params.count);
  lamb_update({params.tensors, params.count, params.options, squared_norms.data(), params.grad_scale,
               params.found_inf},
              isa, parallel_for);
  lamb_apply({params.tensors, params.count, params.options, squared_norms.data(), params.found_inf}, isa,
             parallel_for);
}

}  // namespace evakernels::cpu
