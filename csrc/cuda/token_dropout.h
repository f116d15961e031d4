// Patches gathered, with their position embeddings and the prefix, on a GPU. See residual_norm.h on streams
// and scratch.
//
// A token_index that is out of range, or in backward one that names a token twice, ends the launch with an
// error, as torch's own gather does with the former.
#pragma once

#include "common/token_dropout.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

EVAKERNELS_API Error token_dropout_forward(const TokenDropoutForward& params, Stream stream);

// The result depends on the shape alone.
EVAKERNELS_API Error token_dropout_backward(const TokenDropoutBackward& params, Scratch& scratch,
                                            Stream stream);

// For patches whose channels lie side by side, and for channels whose patches do; what the first chooses
// from.
Error token_dropout_forward_rows(const TokenDropoutForward& params, Stream stream);
Error token_dropout_forward_tiles(const TokenDropoutForward& params, Stream stream);

}  // namespace evakernels::cuda
