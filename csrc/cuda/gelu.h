// gelu(x + bias) and its gradients, on a GPU. See residual_norm.h on streams and scratch.
#pragma once

#include "common/gelu.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

EVAKERNELS_API Error gelu_forward(const GeluForward& params, Stream stream);

// The result depends on the shape and the GPU alone.
EVAKERNELS_API Error gelu_backward(const GeluBackward& params, Scratch& scratch, Stream stream);

}  // namespace evakernels::cuda
