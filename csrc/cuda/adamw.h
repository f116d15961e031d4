// AdamW over a list of tensors of any sizes and dtypes, on a GPU. See residual_norm.h on streams and scratch,
// lamb.h on the arrays of tensors.
#pragma once

#include "common/adamw.h"
#include "cuda/stream.h"

namespace evakernels::cuda {

EVAKERNELS_API Error adamw_update(const AdamwUpdate& params, Scratch& scratch, Stream stream);

}  // namespace evakernels::cuda
