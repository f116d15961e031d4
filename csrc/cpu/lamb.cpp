#include "include/lamb.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

// Elements per task, and per partial norm.
constexpr int64_t kChunk = 16384;

// The chunks of all tensors, so that threads get equal shares whatever the sizes.
class Chunks {
 public:
  Chunks(const OptimizedTensor* tensors, int64_t count) : tensors_(tensors), first_(count + 1) {
    for (int64_t i = 0; i < count; ++i) {
      first_[i + 1] = first_[i] + ceil_div(tensors[i].size, kChunk);
      elements_ += tensors[i].size;
    }
  }

  int64_t count() const { return first_.back(); }
  int64_t first_of(int64_t tensor) const { return first_[tensor]; }

  // Calls body(tensor, chunk, begin, end) in parallel, with the range of the tensor's elements.
  template <class Body>
  void for_each(ParallelFor parallel_for, const Body& body) const {
    if (count() == 0) return;
    run_parallel(parallel_for, count(), tasks_grain(elements_ / count()), [&](int64_t from, int64_t to) {
      int64_t tensor = std::upper_bound(first_.begin(), first_.end(), from) - first_.begin() - 1;
      for (int64_t chunk = from; chunk < to; ++chunk) {
        while (chunk >= first_[tensor + 1]) ++tensor;
        const int64_t begin = (chunk - first_[tensor]) * kChunk;
        body(tensor, chunk, begin, std::min(begin + kChunk, tensors_[tensor].size));
      }
    });
  }

 private:
  const OptimizedTensor* tensors_;
  std::vector<int64_t> first_;
  int64_t elements_ = 0;
};

bool is_set(const float* found_inf) { return found_inf && *found_inf > 0.0f; }

// 1 - beta^step, to full precision also for beta close to 1.
double bias_of(double beta, const OptimizedTensor& tensor) {
  return -std::expm1(*tensor.step * std::log1p(beta - 1.0));
}

void count_steps(const OptimizedTensor* tensors, int64_t count) {
  for (int64_t i = 0; i < count; ++i) *tensors[i].step += 1.0f;
}

// Reciprocal of the loss scale, which is exact for powers of two.
float factor_of_gradients(const float* grad_scale) {
  return static_cast<float>(1.0 / (grad_scale ? *grad_scale : 1.0f));
}

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

// Step size: learning rate * trust ratio * bias correction.
double factor_of(const OptimizedTensor& tensor, const LambOptions& options, const float* squared_norms) {
  const double param = std::sqrt(squared_norms[0]), direction = std::sqrt(squared_norms[1]);
  const double ratio = param > 0 && direction > 0 ? param / direction : 1.0;
  if (options.nvlamb) return tensor.weight_decay != 0 ? tensor.lr * ratio : tensor.lr;
  const double correction = std::sqrt(bias_of(options.beta2, tensor)) / bias_of(options.beta1, tensor);
  return tensor.lr * correction * std::clamp(ratio, kLowestRatio, kHighestRatio);
}

}  // namespace

void lamb_update(const LambUpdate& params, Isa isa, ParallelFor parallel_for) {
  const LambKernels& kernels = EVAKERNELS_OF_ISA(isa, lamb);
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
  const LambKernels& kernels = EVAKERNELS_OF_ISA(isa, lamb);
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

}  // namespace evakernels::cpu
