#include "cuda/adamw.h"
#include "cuda/gradient_norm.h"
#include "drive_optimizer.h"

namespace evakernels::drive {
namespace {

// The parameter after a step.
std::vector<double> expected_of(const OptimizerState& state) {
  std::vector<double> w(state.size());
  for (int64_t i = 0; i < state.size(); ++i) {
    const auto [m, v] = state.moments(i);
    const double direction = m / bias_of(kBeta1) / (std::sqrt(v / bias_of(kBeta2)) + kEps);
    w[i] = (1.0 - kRate * kDecay) * state.param(i) - kRate * direction;
  }
  return w;
}

void drive_gradient_norm(const std::vector<OptimizerState>& states,
                         const std::vector<OptimizedTensor>& tensors) {
  double squares = 0.0;
  for (const OptimizerState& state : states) {
    for (int64_t i = 0; i < state.size(); ++i) squares += state.gradient(i) * state.gradient(i);
  }
  Buffer norm(DType::Float32, 1);
  const GradientNorm params = {tensors.data(), static_cast<int64_t>(tensors.size()), norm.floats()};
  Scratch scratch;
  run(cuda::gradient_norm(params, scratch, nullptr), "gradient_norm");
  compare(norm, {std::sqrt(squares)}, "the norm of the gradients", DType::Float32);
}

}  // namespace

void drive_adamw() {
  std::vector<OptimizerState> states = optimizer_states();
  const std::vector<OptimizedTensor> tensors = tensors_of(states);
  drive_gradient_norm(states, tensors);

  std::vector<std::vector<double>> expected;
  for (const OptimizerState& state : states) expected.push_back(expected_of(state));
  Buffer grad_scale = Buffer::of(kGradScale), found_inf = Buffer::of(0.0f);
  const AdamwUpdate update = {
      tensors.data(),    static_cast<int64_t>(tensors.size()), kBeta1, kBeta2, kEps, grad_scale.floats(),
      found_inf.floats()};
  Scratch scratch;
  run(cuda::adamw_update(update, scratch, nullptr), "adamw_update");
  for (size_t i = 0; i < states.size(); ++i) states[i].check_result(expected[i], "adamw");
}

}  // namespace evakernels::drive
