// The loops of attention in bfloat16, for the instruction sets that have products of it.
#pragma once

#include <cstdint>

#include "include/rope_attention.h"

namespace evakernels::cpu {

// Rows of queries that a task of forward has, and that backward takes at a time.
constexpr int64_t kAttentionBlockRows = 96;

constexpr int64_t kMaxAttentionHeadDim = 128;

// workspace: as many floats as the function of that name tells, zeros, aligned to 64 bytes.
struct BFloat16AttentionKernels {
  int64_t (*forward_workspace)(const HeadsShape& shape);
  int64_t (*backward_workspace)(const HeadsShape& shape);

  // Blocks [begin, end) of query rows; those of a head follow each other.
  void (*forward)(const BFloat16AttentionForward& params, float* workspace, int64_t begin, int64_t end);

  // Heads [begin, end).
  void (*backward)(const BFloat16AttentionBackward& params, float* workspace, int64_t begin, int64_t end);
};

namespace avx512_bf16 {
extern const BFloat16AttentionKernels bfloat16_attention;
}
namespace amx {
extern const BFloat16AttentionKernels bfloat16_attention;
}

}  // namespace evakernels::cpu
