// GELU with the bias in front of it, on the CPU.
#pragma once

#include "common/gelu.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace evakernels::cpu {

EVAKERNELS_API void gelu_forward(const GeluForward& params, Isa isa, ParallelFor parallel_for);

// The result depends on the shape alone, never on the number of threads.
EVAKERNELS_API void gelu_backward(const GeluBackward& params, Isa isa, ParallelFor parallel_for);

}  // namespace evakernels::cpu
