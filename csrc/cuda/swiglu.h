// The gated product of a SwiGLU MLP and the LayerNorm after it, on a GPU. See residual_norm.h on streams and
// scratch.
#pragma once

#include "common/swiglu.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

EVAKERNELS_API Error swiglu_forward(const SwigluForward& params, Stream stream);

// The result depends on the shape and the GPU alone.
EVAKERNELS_API Error swiglu_backward(const SwigluBackward& params, Scratch& scratch, Stream stream);

// Without and with the norm; what the above choose from.
Error swiglu_product_forward(const SwigluForward& params, Stream stream);
Error swiglu_product_backward(const SwigluBackward& params, Stream stream);
Error swiglu_norm_forward(const SwigluForward& params, Stream stream);
Error swiglu_norm_backward(const SwigluBackward& params, Scratch& scratch, Stream stream);

}  // namespace evakernels::cuda
