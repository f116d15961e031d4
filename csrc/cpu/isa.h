// Instruction sets of the CPU kernels, and the one in use.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "include/launcher.h"

// Exported from _ops.so to the Python module; everything else in it is hidden.
#define EVAKERNELS_API __attribute__((visibility("default")))

namespace evakernels::cpu {

// Each contains the ones before it. Avx512Bf16 adds dot products of bfloat16 pairs and of bytes (VNNI), Amx
// bfloat16 matmuls on tiles.
enum class Isa { Baseline, Avx2, Avx512, Avx512Bf16, Amx };

EVAKERNELS_API const char* name(Isa isa);

// In ascending order of preference.
EVAKERNELS_API std::vector<Isa> built_isas();

// The instruction sets of built_isas() that this machine can run.
EVAKERNELS_API std::vector<Isa> available_isas();

// Throws std::invalid_argument, which lists the accepted names, unless the instruction set is available.
EVAKERNELS_API Isa parse_isa(std::string_view text);

// $EVAKERNELS_ISA if set, else the best available one. Decided once; throws as parse_isa does.
EVAKERNELS_API Isa active_isa();

}  // namespace evakernels::cpu
