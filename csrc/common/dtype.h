// Element types of the buffers that kernels read and write.
#pragma once

#include <cstdint>

namespace evakernels {

enum class DType : int32_t { Float32, BFloat16, Float16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace evakernels
