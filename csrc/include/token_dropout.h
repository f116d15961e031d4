// Parameters of the token_dropout launchers:
//
//   out[b, p] = prefix[p] + pos_embed[p]                                 for p < prefix_tokens
//   out[b, prefix_tokens + i] = patches[b, t] + pos_embed[prefix_tokens + t]   with t = token_index[b, i]
#pragma once

#include <cstdint>

#include "common/api.h"
#include "common/dtype.h"
#include "cpu/isa_namespaces.h"
#include "cpu/parallel.h"
#include "cuda/stream.h"

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

namespace cpu {

// The indices are in range and distinct in a sample; backward throws std::invalid_argument where they are
// not.
EVAKERNELS_API void token_dropout_forward(const TokenDropoutForward& params, Isa isa,
                                          ParallelFor parallel_for);

// The sums over the batch are taken in the order of the samples, whatever the number of threads.
EVAKERNELS_API void token_dropout_backward(const TokenDropoutBackward& params, Isa isa,
                                           ParallelFor parallel_for);

// Patches that lie channel by channel are turned round in tiles of this many channels.
constexpr int64_t kTileChannels = 32;

// Backward sums over the samples for this many positions at a time: what lies side by side is fetched before
// it is asked for, and the sums stay in the cache.
constexpr int64_t kSumPositions = 8;

// The loops of token_dropout: one table of functions for each instruction set.
struct TokenDropoutKernels {
  // Rows [begin, end) of out, counted through the batch, when the channels of a patch lie side by side.
  // prefix: as floats.
  void (*forward_rows)(const TokenDropoutForward& params, const float* prefix, int64_t begin, int64_t end);

  // Tiles [begin, end) of out, kTileChannels of one sample each, when the patches of a channel lie side by
  // side. scratch: kept_tokens * kTileChannels floats.
  void (*forward_tiles)(const TokenDropoutForward& params, const float* prefix, float* scratch, int64_t begin,
                        int64_t end);

  // Positions [begin, end), those of the prefix first: the gradients of a patch in all samples and the sums
  // over the samples. place: where a token lies in its sample of dout, -1 where it was dropped,
  // [batch, tokens]; null: the first ones were kept. sums: kSumPositions * channels floats.
  void (*backward)(const TokenDropoutBackward& params, const int32_t* place, float* sums, int64_t begin,
                   int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const TokenDropoutKernels token_dropout;)

}  // namespace cpu

namespace cuda {

// A token_index that is out of range, or in backward a duplicate, ends the launch with an error.
EVAKERNELS_API Error token_dropout_forward(const TokenDropoutForward& params, Stream stream);

// The result depends on the shape alone.
EVAKERNELS_API Error token_dropout_backward(const TokenDropoutBackward& params, Scratch& scratch,
                                            Stream stream);

// Kernels for patches with contiguous channels ("rows") and for channels with contiguous patches ("tiles").
// token_dropout_forward chooses between them.
Error token_dropout_forward_rows(const TokenDropoutForward& params, Stream stream);
Error token_dropout_forward_tiles(const TokenDropoutForward& params, Stream stream);

}  // namespace cuda

}  // namespace evakernels
