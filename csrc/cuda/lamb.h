// LAMB over a list of tensors of any sizes and dtypes, on a GPU. See residual_norm.h on streams and
// workspaces.
//
// The arrays of tensors are read before a launcher returns; what they point to, by the kernels.
#pragma once

#include "common/lamb.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

// The squared norms depend on the sizes and on how the buffers are aligned, never on the GPU.
Error lamb_update(const LambUpdate& params, float* workspace, Stream stream);
int64_t lamb_update_workspace(const LambUpdate& params);

Error lamb_apply(const LambApply& params, float* workspace, Stream stream);
int64_t lamb_apply_workspace(const LambApply& params);

}  // namespace evakernels::cuda
