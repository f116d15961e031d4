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

void drive_gradient_norm(const OptimizerStep& step) {
  double squares = 0.0;
  for (const OptimizerState& state : step.states) {
    for (int64_t i = 0; i < state.size(); ++i) squares += state.gradient(i) * state.gradient(i);
  }
  Buffer norm(DType::Float32, 1);
  Scratch scratch;
  run(cuda::gradient_norm({step.tensors.data(), step.count(), norm.floats()}, scratch, nullptr),
      "gradient_norm");
  compare(norm, {std::sqrt(squares)}, "the norm of the gradients", DType::Float32);
}

}  // namespace

void drive_adamw() {
  OptimizerStep step;
  drive_gradient_norm(step);
  for (const OptimizerState& state : step.states) step.expected.push_back(expected_of(state));
  const AdamwUpdate update = {step.tensors.data(),      step.count(),           kBeta1, kBeta2, kEps,
                              step.grad_scale.floats(), step.found_inf.floats()};
  Scratch scratch;
  run(cuda::adamw_update(update, scratch, nullptr), "adamw_update");
  step.check_results("adamw");
}

}  // namespace evakernels::drive
