// LayerNorm and RMSNorm joined with the residual connection around them, on the CPU.
#pragma once

#include "common/residual_norm.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace evakernels::cpu {

EVAKERNELS_API void add_norm_forward(const AddNormForward& params, Isa isa, ParallelFor parallel_for);
EVAKERNELS_API void norm_add_forward(const NormAddForward& params, Isa isa, ParallelFor parallel_for);

// The results depend on the shape alone, never on the number of threads.
EVAKERNELS_API void add_norm_backward(const AddNormBackward& params, Isa isa, ParallelFor parallel_for);
EVAKERNELS_API void norm_add_backward(const NormAddBackward& params, Isa isa, ParallelFor parallel_for);

}  // namespace evakernels::cpu
