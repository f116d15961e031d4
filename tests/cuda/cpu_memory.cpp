// Memory of the CPU, of which host/allocations.cpp keeps where it begins and ends.
#include <cstdlib>

#include "drive_memory.h"

namespace evakernels::drive {

void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes) != 0) std::abort();
  return memory;
}

void release(void* memory) { std::free(memory); }

void settle(void*, size_t) {}

cuda::Error finish() { return nullptr; }

}  // namespace evakernels::drive
