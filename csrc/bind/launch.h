// From a binding to the kernels: those for the CPU, or those for the GPU that the tensors are on.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "bind/build.h"
#include "bind/torch_arguments.h"
#include "bind/torch_stream.h"
#include "cpu/isa.h"
#include "cuda/stream.h"

namespace evakernels {

inline cuda::Stream current_stream(int32_t device) {
  static const StreamFunction torch_stream = find_stream_function();
  cuda::Stream stream = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_stream(device, &stream));
  return stream;
}

// Calls run(stream) with the device of `tensor` as the current one, and raises the error that it returns.
template <class Run>
void run_on_gpu(const char* op, const Tensor& tensor, const Run& run) {
  cuda::Error error = nullptr;
  if constexpr (kCudaIsInterpreted) {
    error = run(nullptr);
  } else {
    const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
    error = cuda::use_device(tensor.get_device_index());
    if (!error) error = run(current_stream(tensor.get_device_index()));
  }
  if (error) throw std::runtime_error(std::string(op) + ": CUDA error: " + error);
}

// For ops without CPU kernels. These are registered where there are GPU kernels only.
template <auto Cuda, class Params>
void launch_on_gpu(const char* op, const Tensor& tensor, const Params& params) {
  run_on_gpu(op, tensor, [&](cuda::Stream stream) { return Cuda(params, stream); });
}

// For launchers whose kernels keep floats in between, as many as Workspace says.
template <auto Cuda, auto Workspace, class Params>
void launch_on_gpu(const char* op, const Tensor& tensor, const Params& params) {
  run_on_gpu(op, tensor, [&](cuda::Stream stream) {
    const Tensor workspace = new_float32(tensor, {Workspace(params)});
    return Cuda(params, static_cast<float*>(workspace.mutable_data_ptr()), stream);
  });
}

// The launchers are template arguments: those of a device that this build leaves out are never called, so
// they need not be linked.
template <auto Cpu, auto Cuda, class Params>
void launch(const char* op, const Tensor& tensor, const Params& params) {
  if constexpr (kCudaIsBuilt) {
    if (kCudaIsInterpreted || tensor.is_cuda()) {
      return launch_on_gpu<Cuda>(op, tensor, params);
    }
  }
  if constexpr (!kCudaIsInterpreted) Cpu(params, cpu::active_isa(), torch_parallel);
}

template <auto Cpu, auto Cuda, auto Workspace, class Params>
void launch(const char* op, const Tensor& tensor, const Params& params) {
  if constexpr (kCudaIsBuilt) {
    if (kCudaIsInterpreted || tensor.is_cuda()) {
      return launch_on_gpu<Cuda, Workspace>(op, tensor, params);
    }
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

// The same for an op without CPU kernels.
#ifdef EVAKERNELS_INTERPRETED
#define EVAKERNELS_IMPLEMENT_ON_GPU(m, ...) STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CPU, m) __VA_ARGS__
#else
#define EVAKERNELS_IMPLEMENT_ON_GPU(m, ...) STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CUDA, m) __VA_ARGS__
#endif
