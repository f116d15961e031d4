// The loops of token_dropout: one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "common/token_dropout.h"
#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

// Patches that lie channel by channel are turned round in tiles of this many channels.
constexpr int64_t kTileChannels = 32;

// Backward sums over the samples for this many positions at a time: what lies side by side is fetched before
// it is asked for, and the sums stay in the cache.
constexpr int64_t kSumPositions = 8;

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

}  // namespace evakernels::cpu
