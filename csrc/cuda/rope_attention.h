// Attention with the rotary embedding inside, and that of packed batches, on a GPU with tensor cores (compute
// capability 8.0 and later). See residual_norm.h on streams and scratch.
//
// float16 and bfloat16, head_dim up to kMaxHeadDim, up to kMaxTokens queries and as many keys a sequence. A
// token_index or cu_seqlens that are out of range end the launch with an error, as torch's own gather does.
// There are other numbers of keys than of queries without rotation only; the causal ones are then aligned at
// the last token. A query that sees no key has a result of 0, an lse of -inf, and no gradient.
#pragma once

#include "common/rope_attention.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

constexpr int kMaxHeadDim = 128;
constexpr int kMaxTokens = 4096;

// Why the kernels don't serve a call; null if they do.
inline Error unserved(const AttentionShape& shape) {
  if (shape.dtype == DType::Float32) {
    return "attention of float32 has no CUDA kernels; those for CPUs, Triton's and the reference serve it";
  }
  if (shape.tokens > kMaxTokens || shape.keys > kMaxTokens) {
    return "a sequence has more tokens than the CUDA kernels serve, 4096";
  }
  if (shape.head_dim > kMaxHeadDim) return "q has more channels a head than the CUDA kernels serve, 128";
  return nullptr;
}

EVAKERNELS_API Error rope_attention_forward(const RopeAttentionForward& params, Stream stream);

// Scratch is for gradients of queries whose keys a block takes in several rounds. The result depends on the
// shape and the GPU alone.
EVAKERNELS_API Error rope_attention_backward(const RopeAttentionBackward& params, Scratch& scratch,
                                             Stream stream);

}  // namespace evakernels::cuda
