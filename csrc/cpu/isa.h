// The instruction sets that the kernels are compiled for, and the one that this process uses.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "common/api.h"

namespace evakernels::cpu {

// Avx512Bf16: what Avx512 means, and products of bfloat16. Amx: that, and such products of tiles.
enum class Isa { Baseline, Avx2, Avx512, Avx512Bf16, Amx };

EVAKERNELS_API const char* name(Isa isa);

// In ascending order of preference.
EVAKERNELS_API std::vector<Isa> built_isas();

// Those of built_isas() that this machine can run.
EVAKERNELS_API std::vector<Isa> available_isas();

// Throws std::invalid_argument, which lists the accepted names, unless the instruction set is available.
EVAKERNELS_API Isa parse_isa(std::string_view text);

// $EVAKERNELS_ISA if set, else the best available one but Amx. Decided once; throws as parse_isa does.
EVAKERNELS_API Isa active_isa();

}  // namespace evakernels::cpu
