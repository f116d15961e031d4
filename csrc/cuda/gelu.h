// gelu(x + bias) and its gradients, on a GPU. See residual_norm.h on streams and workspaces.
#pragma once

#include "common/gelu.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

EVAKERNELS_API Error gelu_forward(const GeluForward& params, Stream stream);

// The result depends on the shape and the GPU alone.
EVAKERNELS_API Error gelu_backward(const GeluBackward& params, float* workspace, Stream stream);
EVAKERNELS_API int64_t gelu_backward_workspace(const GeluBackward& params);

}  // namespace evakernels::cuda
