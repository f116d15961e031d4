// Parameters of the token_dropout launchers:
//
//   out[b, p] = prefix[p] + pos_embed[p]                                 for p < prefix_tokens
//   out[b, prefix_tokens + i] = patches[b, t] + pos_embed[prefix_tokens + t]   with t = token_index[b, i]
#pragma once

#include "include/launcher.h"

namespace evakernels {

// Patches, strides in elements. Either the channels of a patch are contiguous (channel_stride 1) or the
// patches of a channel (token_stride 1), as a convolution writes them.
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
  void* dpatches;              // [batch, tokens, channels]; zero where a token was dropped; null: not needed
  void* dprefix;               // [prefix_tokens, channels]; null: not needed
  void* dpos_embed;            // [prefix_tokens + tokens, channels]; null: not needed
  TokenDropoutShape shape;
  DType dtype;  // of all buffers
};

namespace cpu {

// Indices must be in range and distinct in a sample; backward throws std::invalid_argument otherwise.
void token_dropout_forward(const TokenDropoutForward& params, Isa isa, ParallelFor parallel_for);

// The result doesn't depend on the number of threads.
void token_dropout_backward(const TokenDropoutBackward& params, Isa isa, ParallelFor parallel_for);

// Channels per tile in the transpose of contiguous patches.
constexpr int64_t kTileChannels = 32;

// Positions that backward sums over the samples at a time: contiguous reads, and sums that stay in the cache.
constexpr int64_t kSumPositions = 8;

// The loops of one instruction set.
struct TokenDropoutKernels {
  // Contiguous channels: rows [begin, end) of out, counted through the batch. prefix: as floats.
  void (*forward_rows)(const TokenDropoutForward& params, const float* prefix, int64_t begin, int64_t end);

  // Contiguous patches: tiles [begin, end) of out, kTileChannels of one sample each. scratch: kept_tokens *
  // kTileChannels floats.
  void (*forward_tiles)(const TokenDropoutForward& params, const float* prefix, float* scratch, int64_t begin,
                        int64_t end);

  // Positions [begin, end), prefix first: gradients of the patches in all samples, and sums over the samples.
  // place: [batch, tokens], a token's index in dout, -1 if it was dropped; null if the first ones were kept.
  // sums: kSumPositions * channels floats.
  void (*backward)(const TokenDropoutBackward& params, const int32_t* place, float* sums, int64_t begin,
                   int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const TokenDropoutKernels token_dropout;)

}  // namespace cpu

namespace cuda {

// A token_index that is out of range, or in backward a duplicate, ends the launch with an error.
Error token_dropout_forward(const TokenDropoutForward& params, Stream stream);

Error token_dropout_backward(const TokenDropoutBackward& params, Scratch& scratch, Stream stream);

}  // namespace cuda

}  // namespace evakernels
