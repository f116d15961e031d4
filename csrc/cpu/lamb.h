// LAMB over a list of tensors of any sizes and dtypes, on the CPU.
#pragma once

#include "common/lamb.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace evakernels::cpu {

// The squared norms depend on the shapes alone, never on the number of threads.
EVAKERNELS_API void lamb_update(const LambUpdate& params, Isa isa, ParallelFor parallel_for);

EVAKERNELS_API void lamb_apply(const LambApply& params, Isa isa, ParallelFor parallel_for);
EVAKERNELS_API void lamb_step(const LambStep& params, Isa isa, ParallelFor parallel_for);

}  // namespace evakernels::cpu
