// Attention with the rotary embedding inside, and that of packed batches, on a GPU with tensor cores (compute
// capability 8.0 and later). See residual_norm.h on streams.
//
// head_dim up to kMaxHeadDim, up to kMaxTokens tokens a sequence. The products of float32 are float32,
// without tensor cores. A token_index or offsets that are out of range end the launch with an error, as
// torch's own gather does.
#pragma once

#include "common/rope_attention.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

constexpr int kMaxHeadDim = 128;
constexpr int kMaxTokens = 4096;

EVAKERNELS_API Error rope_attention_forward(const RopeAttentionForward& params, Stream stream);

// The result depends on the shape and the GPU alone.
EVAKERNELS_API Error rope_attention_backward(const RopeAttentionBackward& params, Stream stream);

}  // namespace evakernels::cuda
