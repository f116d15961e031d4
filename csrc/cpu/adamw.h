// AdamW over a list of tensors of any sizes and dtypes, on the CPU.
#pragma once

#include "common/adamw.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace evakernels::cpu {

EVAKERNELS_API void adamw_update(const AdamwUpdate& params, Isa isa, ParallelFor parallel_for);

}  // namespace evakernels::cpu
