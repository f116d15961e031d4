// LayerNorm and RMSNorm over the last dimension, on a GPU. See residual_norm.h on streams and scratch.
#pragma once

#include "common/layer_norm.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

EVAKERNELS_API Error layer_norm_forward(const LayerNormForward& params, Stream stream);

// The result depends on the shape and the GPU alone.
EVAKERNELS_API Error layer_norm_backward(const LayerNormBackward& params, Scratch& scratch, Stream stream);

}  // namespace evakernels::cuda
