// LayerNorm and RMSNorm over the last dimension, on the CPU.
#pragma once

#include "common/layer_norm.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace evakernels::cpu {

EVAKERNELS_API void layer_norm_forward(const LayerNormForward& params, Isa isa, ParallelFor parallel_for);

// The result depends on the shape alone, never on the number of threads.
EVAKERNELS_API void layer_norm_backward(const LayerNormBackward& params, Isa isa, ParallelFor parallel_for);

}  // namespace evakernels::cpu
