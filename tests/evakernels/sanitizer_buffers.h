// What the programs that run under the sanitizers share: buffers of exactly the right size, and two
// "threads".
#pragma once

#include <vector>

#include "common/dtype.h"
#include "cpu/parallel.h"

namespace evakernels {

inline int64_t item_size(DType dtype) { return dtype == DType::Float32 ? 4 : 2; }

// `count` ones.
inline std::vector<unsigned char> ones(DType dtype, int64_t count) {
  const uint32_t one = dtype == DType::Float32 ? 0x3F800000u : dtype == DType::BFloat16 ? 0x3F80u : 0x3C00u;
  std::vector<unsigned char> bytes;
  bytes.reserve(count * item_size(dtype));
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t byte = 0; byte < item_size(dtype); ++byte) bytes.push_back(one >> (8 * byte));
  }
  return bytes;
}

// Two halves, so that a chunk's range does not begin at zero.
inline void halves(int64_t count, int64_t, cpu::RangeBody body, void* context) {
  if (count > 1) body(0, count / 2, context);
  if (count > 0) body(count / 2, count, context);
}

}  // namespace evakernels
