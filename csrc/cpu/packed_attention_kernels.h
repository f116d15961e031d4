// The loops of packed_attention: one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "common/rope_attention.h"
#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

// Heads [begin, end) of the sequence that has these tokens of a packed batch.
struct SequenceHeads {
  int64_t first;  // token
  int64_t tokens;
  int64_t begin, end;
};

// Of a dense [T, H, D].
static inline HeadsView dense_heads(void* data, const AttentionShape& shape) {
  return {.data = data,
          .batch_stride = 0,
          .token_stride = shape.heads * shape.head_dim,
          .head_stride = shape.head_dim};
}

// workspace: as many floats as the function of that name tells of the longest sequence, aligned to 64 bytes.
// What it holds doesn't matter. rotation: that of params.tables, whose token_index is of all tokens; without
// one a token takes the row of its place in the sequence.
struct PackedAttentionKernels {
  int64_t (*forward_workspace)(int64_t tokens, int64_t head_dim);
  int64_t (*backward_workspace)(int64_t tokens, int64_t head_dim);
  void (*forward)(const RopeAttentionForward& params, const Rotation& rotation, float* workspace,
                  const SequenceHeads& heads);
  void (*backward)(const RopeAttentionBackward& params, const Rotation& rotation, float* workspace,
                   const SequenceHeads& heads);
};

EVAKERNELS_FOR_EACH_ISA(extern const PackedAttentionKernels packed_attention;)

}  // namespace evakernels::cpu
