// LayerNorm and RMSNorm joined with the residual connection around them, on a GPU.
//
// A launcher puts its kernels on the stream and returns; it waits for nothing, and what its kernels keep in
// between lies in memory that it asks `scratch` for. Of the dtypes of residual and branch it serves those
// that gpu_serves tells, of y those that add_norm_serves tells; without a residual, norm + add serves those
// that norm_serves (common/layer_norm.h) tells.
#pragma once

#include "common/residual_norm.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

EVAKERNELS_API Error add_norm_forward(const AddNormForward& params, Stream stream);
EVAKERNELS_API Error norm_add_forward(const NormAddForward& params, Stream stream);

// The results depend on the shape and the GPU alone.
EVAKERNELS_API Error add_norm_backward(const AddNormBackward& params, Scratch& scratch, Stream stream);
EVAKERNELS_API Error norm_add_backward(const NormAddBackward& params, Scratch& scratch, Stream stream);

}  // namespace evakernels::cuda
