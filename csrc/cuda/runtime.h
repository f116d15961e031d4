// Cached queries of the CUDA runtime about kernels and the current device: some take longer than a launch.
#pragma once

#include <cstddef>

#include "include/launcher.h"

namespace evakernels::cuda {

// `code`: a cudaError_t.
Error error_of(int code);

// Raises the kernel's limit of dynamic shared memory to at least `bytes`.
Error allow_shared_memory(const void* kernel, size_t bytes);

// Blocks that are resident on the device at a time; 0 if the query fails.
int resident_blocks(const void* kernel, int threads, size_t shared_bytes);

// Maximum bytes of shared memory per block; 0 if the query fails.
size_t max_shared_memory();

// Multiprocessors of the current device; 0 if the query fails.
int multiprocessors();

}  // namespace evakernels::cuda
