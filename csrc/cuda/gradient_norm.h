// The norm of a list of tensors of any sizes and dtypes, on a GPU. See residual_norm.h on streams and
// scratch, lamb.h on the arrays of tensors.
#pragma once

#include "common/gradient_norm.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

// The norm depends on the sizes and on how the buffers are aligned, never on the GPU.
EVAKERNELS_API Error gradient_norm(const GradientNorm& params, Scratch& scratch, Stream stream);

}  // namespace evakernels::cuda
