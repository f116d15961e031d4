// The devices that this build has kernels for, and the call of a GPU launcher.
//
// EVAKERNELS_CUDA: the build includes the kernels of csrc/cuda. EVAKERNELS_INTERPRETED: a build for tests, in
// which an interpreter runs the PTX of these kernels on CPU tensors, in place of the CPU kernels.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "bind/array.h"
#include "cuda/stream.h"
#include "include/residual_norm.h"

namespace evakernels {

#ifdef EVAKERNELS_CUDA
constexpr bool kCudaIsBuilt = true;
#else
constexpr bool kCudaIsBuilt = false;
#endif
#ifdef EVAKERNELS_INTERPRETED
constexpr bool kCudaIsInterpreted = true;
#else
constexpr bool kCudaIsInterpreted = false;
#endif

inline void raise_if_any(const char* op, cuda::Error error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA error: " + error);
}

// Calls `Cuda`, a launcher with or without scratch memory, and raises its error.
template <auto Cuda, class Params>
void call_launcher(const char* op, const Params& params, cuda::Scratch& scratch, cuda::Stream stream) {
  if constexpr (requires { params.shape.branch_dtype; }) {
    const DType dtype = params.shape.dtype, branch = params.shape.branch_dtype;
    require(gpu_serves(dtype, branch), op, ": branch is ", name_of(branch), " beside ", name_of(dtype),
            "; kernels for GPUs take the same dtype, or any beside float32");
  }
  if constexpr (std::is_invocable_v<decltype(Cuda), const Params&, cuda::Stream>) {
    raise_if_any(op, Cuda(params, stream));
  } else {
    raise_if_any(op, Cuda(params, scratch, stream));
  }
}

}  // namespace evakernels
