#include "drive.h"
#include "include/lamb.h"

namespace evakernels::drive {
namespace {

constexpr float kStepsMade = 3.0f;

struct OptimizerCase {
  int64_t size;
  int64_t offset;  // of the parameter and the gradient in their memory
  DType dtype;     // of these
};

// Vectors only, edges only, nothing, several chunks, one that begins anywhere.
constexpr OptimizerCase kCases[] = {{3, 0, DType::Float32},    {8192, 0, DType::Float32},
                                    {0, 0, DType::Float32},    {3 * 8192 + 5, 0, DType::BFloat16},
                                    {1037, 1, DType::Float16}, {600, 4, DType::Float32}};

struct Lamb {
  std::vector<Buffer> params, steps, others;  // gradients and moments
  std::vector<OptimizedTensor> tensors;
  Buffer grad_scale = Buffer::of(4.0f), found_inf = Buffer::of(0.0f);
  LambOptions options;

  explicit Lamb(bool nvlamb) : options{0.9, 0.98, kEps, nvlamb} {
    for (const OptimizerCase& c : kCases) {
      const int64_t skipped = c.offset * (c.dtype == DType::Float32 ? 4 : 2);
      const auto part = [&](std::vector<Buffer>& buffers) -> TensorBuffer {
        buffers.push_back(Buffer::random(c.dtype, c.offset + c.size));
        return {static_cast<char*>(buffers.back().data()) + skipped, c.dtype};
      };
      const auto moment = [&](bool positive) -> TensorBuffer {
        Buffer& buffer = others.emplace_back(Buffer::random(DType::Float32, c.size));
        for (int64_t i = 0; positive && i < c.size; ++i) buffer.floats()[i] = std::fabs(buffer.floats()[i]);
        buffer.settle();
        return {buffer.data(), DType::Float32};
      };
      steps.push_back(Buffer::of(kStepsMade));
      tensors.push_back({part(params), part(others), moment(false), moment(true), steps.back().floats(),
                         c.size, 0.1, 0.05});
      if (c.dtype == DType::BFloat16) tensors.back().rounding = {.seed = 7, .first_element = 1000};
    }
  }

  int64_t count() const { return static_cast<int64_t>(tensors.size()); }

  void check_results(const std::string& phase) const {
    for (size_t i = 0; i < params.size(); ++i) {
      const std::string name = phase + ", a parameter of " + std::to_string(kCases[i].size);
      check_written(params[i], name);
      check(steps[i].at(0) == kStepsMade + 1.0f, name + ": its step");
    }
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
