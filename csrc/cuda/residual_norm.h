// LayerNorm and RMSNorm joined with the residual connection around them, on a GPU.
//
// A launcher puts its kernels on the stream and returns; it allocates nothing and waits for nothing. The
// workspace is what a backward pass keeps partial sums in: as many floats on the device as the function of
// that name says, of the same params.
#pragma once

#include "common/residual_norm.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

EVAKERNELS_API Error add_norm_forward(const AddNormForward& params, Stream stream);
EVAKERNELS_API Error norm_add_forward(const NormAddForward& params, Stream stream);

// The results depend on the shape and the GPU alone.
EVAKERNELS_API Error add_norm_backward(const AddNormBackward& params, float* workspace, Stream stream);
EVAKERNELS_API Error norm_add_backward(const NormAddBackward& params, float* workspace, Stream stream);

EVAKERNELS_API int64_t add_norm_backward_workspace(const AddNormBackward& params);
EVAKERNELS_API int64_t norm_add_backward_workspace(const NormAddBackward& params);

}  // namespace evakernels::cuda
