// Parameters of the token_dropout launchers:
//
//   out[b, p] = prefix[p] + pos_embed[p]                                 for p < prefix_tokens
//   out[b, prefix_tokens + i] = patches[b, t] + pos_embed[prefix_tokens + t]   with t = token_index[b, i]
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace evakernels {

// Patches as they lie in memory, strides in elements. Either the channels of a patch lie side by side
// (channel_stride 1) or the patches of a channel do (token_stride 1), as a convolution leaves them.
struct PatchTensor {
  const void* data;  // [batch, tokens, channels]
  int64_t sample_stride;
  int64_t token_stride;
  int64_t channel_stride;
  DType dtype;
};

struct TokenDropoutShape {
  int64_t batch;
  int64_t tokens;
  int64_t kept_tokens;
  int64_t prefix_tokens;
  int64_t channels;
};

struct TokenDropoutForward {
  PatchTensor patches;
  const int64_t* token_index;  // [batch, kept_tokens], distinct in a row; null: the first ones
  const void* prefix;          // [prefix_tokens, channels], prefix_dtype
  const void* pos_embed;       // [prefix_tokens + tokens, channels], pos_embed_dtype; null: zeros
  void* out;                   // [batch, prefix_tokens + kept_tokens, channels], out_dtype
  TokenDropoutShape shape;
  DType prefix_dtype;
  DType pos_embed_dtype;
  DType out_dtype;
};

struct TokenDropoutBackward {
  const void* dout;            // [batch, prefix_tokens + kept_tokens, channels]
  const int64_t* token_index;  // [batch, kept_tokens], distinct in a row; null: the first ones
  void* dpatches;              // [batch, tokens, channels]; zero where a token was dropped; null: not wanted
  void* dprefix;               // [prefix_tokens, channels]; null: not wanted
  void* dpos_embed;            // [prefix_tokens + tokens, channels]; null: not wanted
  TokenDropoutShape shape;
  DType dtype;  // of all buffers
};

}  // namespace evakernels
