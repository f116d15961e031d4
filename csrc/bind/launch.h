// From a binding to the kernels: those for the CPU, or those for the GPU that the tensors are on.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "bind/build.h"
#include "bind/gpu_launch.h"
#include "bind/torch_arguments.h"
#include "bind/torch_stream.h"
#include "cpu/isa.h"

namespace evakernels {

inline cuda::Stream current_stream(int32_t device) {
  static const StreamFunction torch_stream = find_stream_function();
  cuda::Stream stream = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_stream(device, &stream));
  return stream;
}

// Memory of torch's allocator, which gives it to nobody else before the stream is done with it.
class TensorScratch final : public cuda::Scratch {
 public:
  explicit TensorScratch(const Tensor& like) : like_(like) {}

  cuda::Error allocate(float** memory, int64_t floats) override {
    memory_ = new_float32(like_, {floats});
    *memory = static_cast<float*>(memory_->mutable_data_ptr());
    return nullptr;
  }

 private:
  const Tensor& like_;
  std::optional<Tensor> memory_;
};

// On the device of `tensor`.
template <auto Cuda, class Params>
void launch_on_gpu(const char* op, const Tensor& tensor, const Params& params) {
  TensorScratch scratch(tensor);
  if constexpr (kCudaIsInterpreted) {
    call_launcher<Cuda>(op, params, scratch, nullptr);
  } else {
    const int32_t device = tensor.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    raise_if_any(op, cuda::use_device(device));
    call_launcher<Cuda>(op, params, scratch, current_stream(device));
  }
}

// The launchers are template arguments: those of a device that this build leaves out are never called, so
// they need not be linked.
template <auto Cpu, auto Cuda, class Params>
void launch(const char* op, const Tensor& tensor, const Params& params) {
  if constexpr (kCudaIsBuilt) {
    if (kCudaIsInterpreted || tensor.is_cuda()) return launch_on_gpu<Cuda>(op, tensor, params);
  }
  if constexpr (!kCudaIsInterpreted) Cpu(params, cpu::active_isa(), torch_parallel);
}

}  // namespace evakernels

// Registers an op's functions, given as statements on the library m, for every device that this build serves.
#if defined(EVAKERNELS_CUDA) && !defined(EVAKERNELS_INTERPRETED)
#define EVAKERNELS_IMPLEMENT(m, ...)                   \
  STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CPU, m) \
  __VA_ARGS__ STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CUDA, m) __VA_ARGS__
#else
#define EVAKERNELS_IMPLEMENT(m, ...) STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CPU, m) __VA_ARGS__
#endif
