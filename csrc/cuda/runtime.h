// What launchers ask the CUDA runtime about kernels and the current device. Each question is asked once, as
// some take longer than a launch; the answers are kept for all threads.
#pragma once

#include <cstddef>

#include "cuda/stream.h"

namespace evakernels::cuda {

// `code`: a cudaError_t.
Error error_of(int code);

// Lets blocks of the kernel have so many bytes of dynamic shared memory, and all that it was let have before.
Error allow_shared_memory(const void* kernel, size_t bytes);

// How many blocks run at the same time; 0 if that can't be told.
int resident_blocks(const void* kernel, int threads, size_t shared_bytes);

// In bytes, 0 if that can't be told: what a block may have of shared memory at most.
size_t max_shared_memory();

// The CUDA that the driver serves, 12010 for 12.1; 0 if that can't be told.
int driver_version();

}  // namespace evakernels::cuda
