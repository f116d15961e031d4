#include <cuda_runtime_api.h>

#include "cuda/memory.h"
#include "cuda/runtime.h"
#include "cuda/stream.h"

namespace evakernels::cuda {
namespace {

// A function of the driver, as the runtime finds it; null if there is none.
template <class Function>
Function* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  return error == cudaSuccess ? reinterpret_cast<Function*>(function) : nullptr;
}

}  // namespace

Error use_device(int device) { return error_of(cudaSetDevice(device)); }

DeviceGuard::DeviceGuard(int device) {
  static auto* const current_context = driver_function<int(void**)>("cuCtxGetCurrent");
  if (!current_context || current_context(&context_) != 0) {
    error_ = "the driver doesn't tell the current context";
    return;
  }
  error_ = use_device(device);
  restores_ = true;
}

DeviceGuard::~DeviceGuard() {
  static auto* const set_context = driver_function<int(void*)>("cuCtxSetCurrent");
  if (restores_ && set_context) set_context(context_);
}

Error allocate(void** memory, size_t bytes, Stream stream) {
  return error_of(cudaMallocAsync(memory, bytes, static_cast<cudaStream_t>(stream)));
}

Error release(void* memory, Stream stream) {
  return error_of(cudaFreeAsync(memory, static_cast<cudaStream_t>(stream)));
}

}  // namespace evakernels::cuda
