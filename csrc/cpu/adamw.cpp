#include "cpu/adamw.h"

#include <cmath>
#include <vector>

#include "cpu/adamw_kernels.h"
#include "cpu/tensor_chunks.h"

namespace evakernels::cpu {
namespace {

const AdamwKernels& kernels_for(Isa isa) { return EVAKERNELS_OF_ISA(isa, adamw); }

AdamwFactors factors_of(const OptimizedTensor& tensor, const AdamwUpdate& params) {
  return {
      .kept = static_cast<float>(1.0 - tensor.lr * tensor.weight_decay),
      .rate = static_cast<float>(tensor.lr / bias_of(params.beta1, tensor)),
      .v_factor = static_cast<float>(1.0 / std::sqrt(bias_of(params.beta2, tensor))),
      .eps = static_cast<float>(params.eps),
  };
}

}  // namespace

void adamw_update(const AdamwUpdate& params, Isa isa, ParallelFor parallel_for) {
  if (is_set(params.found_inf)) return;
  const AdamwKernels& kernels = kernels_for(isa);
  const MomentRates rates = moment_rates(params.beta1, params.beta2);
  const float grad_factor = factor_of_gradients(params.grad_scale);
  count_steps(params.tensors, params.count);
  std::vector<AdamwFactors> factors;
  factors.reserve(params.count);
  for (int64_t i = 0; i < params.count; ++i) factors.push_back(factors_of(params.tensors[i], params));
  const Chunks chunks(params.tensors, params.count);
  chunks.for_each(parallel_for, [&](int64_t tensor, int64_t, int64_t begin, int64_t end) {
    const OptimizedTensor& optimized = params.tensors[tensor];
    const RoundingKey rounding = key_of(optimized.rounding, *optimized.step);
    kernels.update(optimized, rates, grad_factor, factors[tensor], rounding, begin, end);
  });
}

}  // namespace evakernels::cpu
