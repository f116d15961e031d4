// Attention with rotary embedding, of samples or within the sequences of a packed batch, on the CPU.
#pragma once

#include "common/api.h"
#include "common/rope_attention.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace evakernels::cpu {

// Both throw std::invalid_argument for offsets that don't rise from 0 to the number of
// tokens.
EVAKERNELS_API void rope_attention_forward(const RopeAttentionForward& params, Isa isa,
                                           ParallelFor parallel_for);
EVAKERNELS_API void rope_attention_backward(const RopeAttentionBackward& params, Isa isa,
                                            ParallelFor parallel_for);

}  // namespace evakernels::cpu
