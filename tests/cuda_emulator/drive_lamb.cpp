#include <iterator>

#include "cuda/lamb.h"
#include "drive.h"

namespace evakernels::drive {

// One tensor of LAMB: its buffers, the last `offset` elements behind the one that their memory begins with.
struct LambCase {
  int64_t size;
  int64_t offset;  // of the parameter and the gradient
  DType dtype;     // of these
};

class LambState {
 public:
  explicit LambState(const LambCase& c)
      : case_(c),
        w_(Buffer::random(c.dtype, c.offset + c.size)),
        g_(Buffer::random(c.dtype, c.offset + c.size)),
        m_(Buffer::random(DType::Float32, c.size)),
        v_(Buffer::random(DType::Float32, c.size)) {
    for (int64_t i = 0; i < c.size; ++i) v_.floats()[i] = std::fabs(v_.floats()[i]);
  }

  LambTensor tensor() {
    const int64_t skipped = case_.offset * (case_.dtype == DType::Float32 ? 4 : 2);
    const auto part = [&](Buffer& buffer) -> LambBuffer {
      return {static_cast<char*>(buffer.data()) + skipped, buffer.dtype()};
    };
    return {
        part(w_),  part(g_),  {m_.data(), DType::Float32}, {v_.data(), DType::Float32}, &step_, case_.size,
        kLambRate, kLambDecay};
  }

  // The parameter after a step, and the squared norms. Before it is made.
  std::vector<double> expected(double* squared_norms) const {
    std::vector<double> w(case_.size), u(case_.size);
    for (int64_t i = 0; i < case_.size; ++i) {
      const double g = g_.at(case_.offset + i) / kLambScale;
      w[i] = w_.at(case_.offset + i);
      const double m = 0.9 * m_.at(i) + 0.1 * g, v = 0.98 * v_.at(i) + 0.02 * g * g;
      u[i] = m / (std::sqrt(v) + kEps) + kLambDecay * w[i];
      squared_norms[0] += w[i] * w[i];
      squared_norms[1] += u[i] * u[i];
    }
    const double ratio = std::sqrt(squared_norms[0] / squared_norms[1]);
    const double correction = std::sqrt(1.0 - std::pow(0.98, 4)) / (1.0 - std::pow(0.9, 4));
    for (int64_t i = 0; i < case_.size; ++i) w[i] -= kLambRate * correction * ratio * u[i];
    return w;
  }

  void check_result(const std::vector<double>& expected) const {
    Buffer result(DType::Float32, case_.size);
    for (int64_t i = 0; i < case_.size; ++i) {
      result.floats()[i] = static_cast<float>(w_.at(case_.offset + i));
    }
    const std::string name = "a parameter of " + std::to_string(case_.size);
    compare(result, expected, name, case_.dtype);
    check(step_ == 4.0f, name + ": its step");
  }

 private:
  static constexpr double kLambRate = 0.1, kLambDecay = 0.05, kLambScale = 4.0;

  friend void drive_lamb();

  LambCase case_;
  Buffer w_, g_, m_, v_;
  float step_ = 3.0f;
};

void drive_lamb() {
  const LambCase cases[] = {{3, 0, DType::Float32},    {8192, 0, DType::Float32},
                            {0, 0, DType::Float32},    {3 * 8192 + 5, 0, DType::BFloat16},
                            {1037, 1, DType::Float16}, {600, 4, DType::Float32}};
  std::vector<LambState> states(std::begin(cases), std::end(cases));
  std::vector<LambTensor> tensors;
  for (LambState& state : states) tensors.push_back(state.tensor());
  const int64_t count = static_cast<int64_t>(tensors.size());
  std::vector<double> norms(2 * count);
  std::vector<std::vector<double>> expected;
  for (int64_t i = 0; i < count; ++i) expected.push_back(states[i].expected(&norms[2 * i]));

  Buffer squared_norms(DType::Float32, 2 * count);
  const LambOptions options = {0.9, 0.98, kEps, false};
  const float grad_scale = LambState::kLambScale, found_inf = 0.0f;
  const LambUpdate update = {tensors.data(), count, options, squared_norms.floats(), &grad_scale, &found_inf};
  Buffer update_workspace(DType::Float32, cuda::lamb_update_workspace(update));
  run(cuda::lamb_update(update, update_workspace.floats(), nullptr), "lamb_update");
  compare(squared_norms, norms, "the squared norms", DType::Float32);

  for (LambTensor& tensor : tensors) tensor.grad = {};
  const LambApply apply = {tensors.data(), count, options, squared_norms.floats(), &found_inf};
  Buffer apply_workspace(DType::Float32, cuda::lamb_apply_workspace(apply));
  run(cuda::lamb_apply(apply, apply_workspace.floats(), nullptr), "lamb_apply");
  for (int64_t i = 0; i < count; ++i) states[i].check_result(expected[i]);
}

}  // namespace evakernels::drive
