// LAMB over lists of tensors.
#include "include/lamb.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

using Numbers = std::vector<int64_t>;
using RealNumbers = std::vector<double>;
using OptimizedTensors = std::vector<OptimizedTensor>;

LambOptions lamb_options(const RealNumbers& betas_and_eps, bool nvlamb) {
  return {betas_and_eps.at(0), betas_and_eps.at(1), betas_and_eps.at(2), nvlamb};
}

int64_t count_of(const OptimizedTensors& tensors) { return static_cast<int64_t>(tensors.size()); }

TensorBuffer buffer_of(const Array& array, int64_t size) {
  require(product(array.sizes) == size, array.name, " must have the sizes of params");
  return {array.data, array.dtype};
}

float* one_float(const Array& array) {
  if (!array) return nullptr;
  require_dtype(array, DType::Float32);
  require(product(array.sizes) == 1, array.name, " must have one element");
  return array.floats();
}

using Reader = Array (Call::*)(Input, const char*);

// Everything but gradients, learning rates and rounding. A phase updates params, or moments and steps, or
// both.
OptimizedTensors lamb_tensors(Call& call, Inputs params, Inputs exp_avgs, Inputs exp_avg_sqs, Inputs steps,
                              const RealNumbers& weight_decays, Reader read_param, Reader read_state) {
  const size_t count = params.size();
  require(exp_avgs.size() == count && exp_avg_sqs.size() == count && steps.size() == count &&
              weight_decays.size() == count,
          "the lists must be equally long");
  OptimizedTensors tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const Array param = (call.*read_param)(params[i], "params");
    const int64_t size = product(param.sizes);
    tensors[i].param = buffer_of(param, size);
    tensors[i].exp_avg = buffer_of((call.*read_state)(exp_avgs[i], "exp_avgs"), size);
    tensors[i].exp_avg_sq = buffer_of((call.*read_state)(exp_avg_sqs[i], "exp_avg_sqs"), size);
    tensors[i].step = one_float((call.*read_state)(steps[i], "steps"));
    tensors[i].size = size;
    tensors[i].weight_decay = weight_decays[i];
  }
  return tensors;
}

void set_grads(OptimizedTensors& tensors, Call& call, Inputs grads) {
  require(grads.size() == tensors.size(), "the lists must be equally long");
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].grad = buffer_of(call.read(grads[i], "grads"), tensors[i].size);
  }
}

void set_lrs(OptimizedTensors& tensors, Call& call, const RealNumbers& lrs, OptionalInput device_lrs) {
  const Array rates = call.read_float32_optional(device_lrs, "device_lrs");
  if (rates) require_sizes(rates, {count_of(tensors)});
  require(rates || lrs.size() == tensors.size(), "lrs must be as many as params");
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].lr = rates ? rates.floats()[i] : lrs[i];
}

// Without seeds: round to nearest.
void set_rounding(OptimizedTensors& tensors, const Numbers& seeds, const Numbers& first_elements) {
  if (seeds.empty()) return;
  require(seeds.size() == tensors.size() && first_elements.size() == tensors.size(),
          "seeds and first_elements must be as many as params");
  for (size_t i = 0; i < tensors.size(); ++i) {
    require(tensors[i].param.dtype == DType::BFloat16, "params must be bfloat16 where there are seeds");
    require(seeds[i] >= 0 && first_elements[i] >= 0, "seeds and first_elements must be 0 or more");
    tensors[i].rounding = {seeds[i], first_elements[i]};
  }
}

Tensor lamb_update(Inputs params, Inputs grads, Inputs exp_avgs, Inputs exp_avg_sqs, Inputs steps,
                   const RealNumbers& weight_decays, const RealNumbers& betas_and_eps, bool nvlamb,
                   OptionalInput grad_scale, OptionalInput found_inf) {
  Call call;
  OptimizedTensors tensors =
      lamb_tensors(call, params, exp_avgs, exp_avg_sqs, steps, weight_decays, &Call::read, &Call::update);
  set_grads(tensors, call, grads);
  const int64_t sizes[] = {count_of(tensors), 2};
  const LambUpdate update = {
      .tensors = tensors.data(),
      .count = count_of(tensors),
      .options = lamb_options(betas_and_eps, nvlamb),
      .squared_norms = call.output("squared_norms", sizes, DType::Float32).floats(),
      .grad_scale = one_float(call.read_float32_optional(grad_scale, "grad_scale")),
      .found_inf = one_float(call.read_float32_optional(found_inf, "found_inf")),
  };
  call.launch<cpu::lamb_update, nullptr>("lamb_update", update);
  return call.results<1>();
}

void lamb_apply(Inputs params, Inputs exp_avgs, Inputs exp_avg_sqs, Inputs steps, Input squared_norms,
                const RealNumbers& lrs, const RealNumbers& weight_decays, const RealNumbers& betas_and_eps,
                bool nvlamb, OptionalInput found_inf, const Numbers& seeds, const Numbers& first_elements,
                OptionalInput device_lrs) {
  Call call;
  OptimizedTensors tensors =
      lamb_tensors(call, params, exp_avgs, exp_avg_sqs, steps, weight_decays, &Call::update, &Call::read);
  set_lrs(tensors, call, lrs, device_lrs);
  set_rounding(tensors, seeds, first_elements);
  const Array norms = call.read_float32(squared_norms, "squared_norms");
  require_sizes(norms, {count_of(tensors), 2});
  const LambApply apply = {
      .tensors = tensors.data(),
      .count = count_of(tensors),
      .options = lamb_options(betas_and_eps, nvlamb),
      .squared_norms = norms.floats(),
      .found_inf = one_float(call.read_float32_optional(found_inf, "found_inf")),
  };
  call.launch<cpu::lamb_apply, nullptr>("lamb_apply", apply);
}

}  // namespace

EVAKERNELS_CPU_OPS(lamb, m) {
  EVAKERNELS_OP(m, lamb_update);
  EVAKERNELS_OP(m, lamb_apply);
}

}  // namespace evakernels
