#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>

#include "drive_memory.h"

namespace evakernels::drive {
namespace {

void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(code));
  std::fflush(stdout);
  std::_Exit(2);  // nothing can be driven any more
}

}  // namespace

void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMallocManaged(&memory, bytes), "cudaMallocManaged");
  return memory;
}

void release(void* memory) { cudaFree(memory); }

void settle(void* memory, size_t bytes) {
  if (bytes == 0) return;
  const std::vector<char> copy(static_cast<char*>(memory), static_cast<char*>(memory) + bytes);
  check(cudaMemcpy(memory, copy.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  check(cudaDeviceSynchronize(), "cudaMemcpy");
}

cuda::Error finish() {
  const cudaError_t code = cudaDeviceSynchronize();
  return code == cudaSuccess ? nullptr : cudaGetErrorString(code);
}

}  // namespace evakernels::drive
