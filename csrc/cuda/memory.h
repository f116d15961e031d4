// Memory of a GPU that a stream uses, for callers of launchers who have no allocator of their own.
#pragma once

#include <cstddef>

#include "cuda/stream.h"

namespace evakernels::cuda {

// Of the current device, for what is put on the stream from now on.
EVAKERNELS_API Error allocate(void** memory, size_t bytes, Stream stream);

// When the stream is done with what was put on it until now.
EVAKERNELS_API Error release(void* memory, Stream stream);

}  // namespace evakernels::cuda
