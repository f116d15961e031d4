// The loops of rope_attention and packed_attention: one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "common/rope_attention.h"
#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

// Heads [begin, end) of a sample, or of the sequence of a packed batch that begins at token `first` of the
// only sample.
struct SequenceHeads {
  int64_t sample;
  int64_t first;
  int64_t tokens;
  int64_t keys;
  int64_t begin, end;
};

// Of a dense [B, tokens, H, D] or, of a packed batch, [T, H, D].
static inline HeadsView dense_heads(void* data, const AttentionShape& shape, int64_t tokens) {
  const int64_t token_stride = shape.heads * shape.head_dim;
  return {.data = data,
          .batch_stride = tokens * token_stride,
          .token_stride = token_stride,
          .head_stride = shape.head_dim};
}

// From a head's log-sum-exps to those of the next one: they are [B, H, N] or, of a packed batch, [H, T].
static inline int64_t lse_stride(const AttentionShape& shape) {
  return shape.offsets.data != nullptr ? shape.offsets.tokens : shape.tokens;
}

template <class T>
static inline T* lse_of_head(T* lse, const AttentionShape& shape, const SequenceHeads& heads, int64_t head) {
  return lse + (heads.sample * shape.heads + head) * lse_stride(shape) + heads.first;
}

// workspace: as many floats as the function of that name tells of the most keys, aligned to 64 bytes.
// What it holds doesn't matter. rotation: that of params.tables, whose token_index is of all tokens of a
// packed batch; without one a token takes the row of its place in the sequence.
struct RopeAttentionKernels {
  int64_t (*forward_workspace)(int64_t keys, int64_t head_dim);
  int64_t (*backward_workspace)(int64_t keys, int64_t head_dim);
  void (*forward)(const RopeAttentionForward& params, const Rotation& rotation, float* workspace,
                  const SequenceHeads& heads);
  void (*backward)(const RopeAttentionBackward& params, const Rotation& rotation, float* workspace,
                   const SequenceHeads& heads);
};

EVAKERNELS_FOR_EACH_ISA(extern const RopeAttentionKernels rope_attention;)

}  // namespace evakernels::cpu
