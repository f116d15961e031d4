#include <cuda_runtime_api.h>

#include "cuda/stream.h"

namespace evakernels::cuda {

Error use_device(int device) {
  const cudaError_t code = cudaSetDevice(device);
  return code == cudaSuccess ? nullptr : cudaGetErrorString(code);
}

}  // namespace evakernels::cuda
