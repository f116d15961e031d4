// What this build has kernels for.
//
// EVAKERNELS_CUDA: the kernels of csrc/cuda are part of it. EVAKERNELS_EMULATED: they are emulated on the CPU
// and serve its arrays, in place of its own kernels; that is a build for tests.
#pragma once

namespace evakernels {

#ifdef EVAKERNELS_CUDA
constexpr bool kCudaIsBuilt = true;
#else
constexpr bool kCudaIsBuilt = false;
#endif
#ifdef EVAKERNELS_EMULATED
constexpr bool kCudaIsEmulated = true;
#else
constexpr bool kCudaIsEmulated = false;
#endif

}  // namespace evakernels
