#include "cuda/memory.h"

#include <cstdlib>

namespace evakernels::cuda {

Error allocate(void** memory, size_t bytes, Stream) {
  constexpr size_t kAlignment = 256;  // as on a GPU
  *memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  return *memory ? nullptr : "out of memory";
}

Error release(void* memory, Stream) {
  std::free(memory);
  return nullptr;
}

}  // namespace evakernels::cuda
