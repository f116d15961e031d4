#include "cuda/lamb.h"
#include "drive_optimizer.h"

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

void drive_lamb_step(bool nvlamb) {
  std::vector<OptimizerState> states = optimizer_states();
  const std::vector<OptimizedTensor> tensors = tensors_of(states);
  const int64_t count = static_cast<int64_t>(tensors.size());
  std::vector<double> norms(2 * count);
  std::vector<std::vector<double>> expected;
  for (int64_t i = 0; i < count; ++i) expected.push_back(expected_of(states[i], &norms[2 * i], nvlamb));

  Buffer grad_scale = Buffer::of(kGradScale), found_inf = Buffer::of(0.0f);
  const LambStep step = {
      tensors.data(), count, {kBeta1, kBeta2, kEps, nvlamb}, grad_scale.floats(), found_inf.floats()};
  Scratch scratch;
  run(cuda::lamb_step(step, scratch, nullptr), "lamb_step");
  for (int64_t i = 0; i < count; ++i) states[i].check_result(expected[i], "lamb_step");
}

}  // namespace

void drive_lamb() {
  for (const bool nvlamb : {false, true}) drive_lamb_step(nvlamb);
  std::vector<OptimizerState> states = optimizer_states();
  std::vector<OptimizedTensor> tensors = tensors_of(states);
  const int64_t count = static_cast<int64_t>(tensors.size());
  std::vector<double> norms(2 * count);
  std::vector<std::vector<double>> expected;
  for (int64_t i = 0; i < count; ++i) expected.push_back(expected_of(states[i], &norms[2 * i], false));

  Buffer squared_norms(DType::Float32, 2 * count);
  const LambOptions options = {kBeta1, kBeta2, kEps, false};
  Buffer grad_scale = Buffer::of(kGradScale), found_inf = Buffer::of(0.0f);
  const LambUpdate update = {tensors.data(),    count, options, squared_norms.floats(), grad_scale.floats(),
                             found_inf.floats()};
  Scratch update_scratch;
  run(cuda::lamb_update(update, update_scratch, nullptr), "lamb_update");
  compare(squared_norms, norms, "the squared norms", DType::Float32);

  for (OptimizedTensor& tensor : tensors) tensor.grad = {};
  const LambApply apply = {tensors.data(), count, options, squared_norms.floats(), found_inf.floats()};
  Scratch apply_scratch;
  run(cuda::lamb_apply(apply, apply_scratch, nullptr), "lamb_apply");
  for (int64_t i = 0; i < count; ++i) states[i].check_result(expected[i], "lamb");
}

}  // namespace evakernels::drive
