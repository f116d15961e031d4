// The loops of rope_attention: one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "common/rope_attention.h"
#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

// All work on rows [begin, end); row r is token r % N of head r / N of the chunk.
struct RopeAttentionKernels {
  void (*pack)(const PackHeads& params, int64_t begin, int64_t end);
  void (*unpack)(const PackHeads& params, int64_t begin, int64_t end);
  void (*weights)(const AttentionWeights& params, int64_t begin, int64_t end);
  void (*gradients)(const AttentionGradients& params, int64_t begin, int64_t end);
  void (*dots)(const HeadDots& params, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const RopeAttentionKernels rope_attention;)

}  // namespace evakernels::cpu
