#include <cuda_runtime_api.h>

#include "cuda/memory.h"
#include "cuda/stream.h"

namespace evakernels::cuda {
namespace {

Error error_of(cudaError_t code) { return code == cudaSuccess ? nullptr : cudaGetErrorString(code); }

}  // namespace

Error use_device(int device) { return error_of(cudaSetDevice(device)); }

Error allocate(void** memory, size_t bytes, Stream stream) {
  return error_of(cudaMallocAsync(memory, bytes, static_cast<cudaStream_t>(stream)));
}

Error release(void* memory, Stream stream) {
  return error_of(cudaFreeAsync(memory, static_cast<cudaStream_t>(stream)));
}

}  // namespace evakernels::cuda
