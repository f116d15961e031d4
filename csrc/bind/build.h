// What this build has kernels for.
//
// EVAKERNELS_CUDA: the kernels of csrc/cuda are part of it. EVAKERNELS_INTERPRETED: their PTX is interpreted
// on the CPU and serve its arrays, in place of its own kernels; that is a build for tests.
#pragma once

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

}  // namespace evakernels
