#include "drive_optimizer.h"
#include "include/lamb.h"

namespace evakernels::drive {
namespace {

// The parameter after a step, and the squared norms.
std::vector<double> expected_of(const OptimizerState& state, double* squared_norms, bool nvlamb) {
  const double bias1 = bias_of(kBeta1), bias2 = bias_of(kBeta2);
  std::vector<double> w(state.size()), u(state.size());
  for (int64_t i = 0; i < state.size(); ++i) {
    const auto [m, v] = state.moments(i);
    w[i] = state.param(i);
    u[i] = (nvlamb ? m / bias1 / (std::sqrt(v / bias2) + kEps) : m / (std::sqrt(v) + kEps)) + kDecay * w[i];
    squared_norms[0] += w[i] * w[i];
    squared_norms[1] += u[i] * u[i];
  }
  const double ratio = std::sqrt(squared_norms[0] / squared_norms[1]);
  const double correction = nvlamb ? 1.0 : std::sqrt(bias2) / bias1;
  for (int64_t i = 0; i < state.size(); ++i) w[i] -= kRate * correction * ratio * u[i];
  return w;
}

struct Lamb : OptimizerStep {
  LambOptions options;
  std::vector<double> norms;

  explicit Lamb(bool nvlamb) : options{kBeta1, kBeta2, kEps, nvlamb}, norms(2 * count()) {
    for (int64_t i = 0; i < count(); ++i) expected.push_back(expected_of(states[i], &norms[2 * i], nvlamb));
  }
};

}  // namespace

void drive_lamb() {
  for (const bool nvlamb : {false, true}) {
    Lamb step(nvlamb);
    Scratch scratch;
    run(cuda::lamb_step({step.tensors.data(), step.count(), step.options, step.grad_scale.floats(),
                         step.found_inf.floats()},
                        scratch, nullptr),
        "lamb_step");
    step.check_results("lamb_step");
  }
  Lamb phases(false);
  Buffer squared_norms(DType::Float32, 2 * phases.count());
  const LambUpdate update = {
      phases.tensors.data(),      phases.count(),           phases.options, squared_norms.floats(),
      phases.grad_scale.floats(), phases.found_inf.floats()};
  Scratch update_scratch;
  run(cuda::lamb_update(update, update_scratch, nullptr), "lamb_update");
  compare(squared_norms, phases.norms, "the squared norms", DType::Float32);

  for (OptimizedTensor& tensor : phases.tensors) tensor.grad = {};
  const LambApply apply = {phases.tensors.data(), phases.count(), phases.options, squared_norms.floats(),
                           phases.found_inf.floats()};
  Scratch apply_scratch;
  run(cuda::lamb_apply(apply, apply_scratch, nullptr), "lamb_apply");
  phases.check_results("lamb");
}

}  // namespace evakernels::drive
