#include "drive.h"
#include "include/lamb.h"

namespace evakernels::drive {
namespace {

constexpr double kRate = 0.1, kDecay = 0.05, kGradScale = 4.0;
constexpr double kBeta1 = 0.9, kBeta2 = 0.98;
constexpr float kStepsMade = 3.0f;

struct OptimizerCase {
  int64_t size;
  int64_t offset;  // of the parameter and the gradient in their memory
  DType dtype;     // of these
};

// One tensor.
class OptimizerState {
 public:
  explicit OptimizerState(const OptimizerCase& c)
      : case_(c),
        w_(Buffer::random(c.dtype, c.offset + c.size)),
        g_(Buffer::random(c.dtype, c.offset + c.size)),
        m_(Buffer::random(DType::Float32, c.size)),
        v_(Buffer::random(DType::Float32, c.size)) {
    for (int64_t i = 0; i < c.size; ++i) v_.floats()[i] = std::fabs(v_.floats()[i]);
    v_.settle();
  }

  OptimizedTensor tensor() {
    const int64_t skipped = case_.offset * (case_.dtype == DType::Float32 ? 4 : 2);
    const auto part = [&](Buffer& buffer) -> TensorBuffer {
      return {static_cast<char*>(buffer.data()) + skipped, buffer.dtype()};
    };
    OptimizedTensor tensor = {part(w_),
                              part(g_),
                              {m_.data(), DType::Float32},
                              {v_.data(), DType::Float32},
                              step_.floats(),
                              case_.size,
                              kRate,
                              kDecay};
    if (case_.dtype == DType::BFloat16) tensor.rounding = {.seed = 7, .first_element = 1000};
    return tensor;
  }

  void check_result(const std::string& phase) const {
    const std::string name = phase + ", a parameter of " + std::to_string(case_.size);
    check_written(w_, name);
    check(step_.at(0) == kStepsMade + 1.0f, name + ": its step");
  }

 private:
  OptimizerCase case_;
  Buffer w_, g_, m_, v_;
  Buffer step_ = Buffer::of(kStepsMade);
};

// Vectors only, edges only, nothing, several chunks, one that begins anywhere.
std::vector<OptimizerState> optimizer_states() {
  const OptimizerCase cases[] = {{3, 0, DType::Float32},    {8192, 0, DType::Float32},
                                 {0, 0, DType::Float32},    {3 * 8192 + 5, 0, DType::BFloat16},
                                 {1037, 1, DType::Float16}, {600, 4, DType::Float32}};
  return {std::begin(cases), std::end(cases)};
}

struct Lamb {
  std::vector<OptimizerState> states = optimizer_states();
  std::vector<OptimizedTensor> tensors;
  Buffer grad_scale = Buffer::of(kGradScale), found_inf = Buffer::of(0.0f);
  LambOptions options;

  explicit Lamb(bool nvlamb) : options{kBeta1, kBeta2, kEps, nvlamb} {
    for (OptimizerState& state : states) tensors.push_back(state.tensor());
  }

  int64_t count() const { return static_cast<int64_t>(tensors.size()); }

  void check_results(const std::string& phase) const {
    for (const OptimizerState& state : states) state.check_result(phase);
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
  check_written(squared_norms, "the squared norms");

  for (OptimizedTensor& tensor : phases.tensors) tensor.grad = {};
  const LambApply apply = {phases.tensors.data(), phases.count(), phases.options, squared_norms.floats(),
                           phases.found_inf.floats()};
  Scratch apply_scratch;
  run(cuda::lamb_apply(apply, apply_scratch, nullptr), "lamb_apply");
  phases.check_results("lamb");
}

}  // namespace evakernels::drive
