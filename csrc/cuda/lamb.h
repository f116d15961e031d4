// LAMB over a list of tensors of any sizes and dtypes, on a GPU. See residual_norm.h on streams and scratch.
//
// The arrays of tensors are read before a launcher returns; what they point to, by the kernels.
#pragma once

#include "common/lamb.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

// The squared norms depend on the sizes and on how the buffers are aligned, never on the GPU.
EVAKERNELS_API Error lamb_update(const LambUpdate& params, Scratch& scratch, Stream stream);

EVAKERNELS_API Error lamb_apply(const LambApply& params, Scratch& scratch, Stream stream);

// To the same bits as both.
EVAKERNELS_API Error lamb_step(const LambStep& params, Scratch& scratch, Stream stream);

}  // namespace evakernels::cuda
