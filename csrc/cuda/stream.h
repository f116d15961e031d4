// What a launcher is given and returns.
#pragma once

#include "common/api.h"

namespace evakernels::cuda {

using Stream = void*;  // a cudaStream_t

// What went wrong; null: nothing.
using Error = const char*;

// Makes it the current one of the CUDA runtime that is linked into this library. torch has a runtime of its
// own, whose current device it sets itself.
EVAKERNELS_API Error use_device(int device);

}  // namespace evakernels::cuda
