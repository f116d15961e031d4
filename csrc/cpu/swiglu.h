// The gated product of a SwiGLU MLP and the LayerNorm that may follow it, on the CPU.
#pragma once

#include "common/swiglu.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace evakernels::cpu {

EVAKERNELS_API void swiglu_forward(const SwigluForward& params, Isa isa, ParallelFor parallel_for);

// The result depends on the shape alone, never on the number of threads.
EVAKERNELS_API void swiglu_backward(const SwigluBackward& params, Isa isa, ParallelFor parallel_for);

}  // namespace evakernels::cpu
