// Attention with rotary embedding in bfloat16, on a CPU that has products of it.
#pragma once

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "include/rope_attention.h"

namespace evakernels::cpu {

// Whether the functions below serve this shape on this instruction set. They don't serve small ones, for
// which it costs little not to round weights.
bool has_bfloat16_attention(Isa isa, const HeadsShape& shape);

void bfloat16_attention_forward(const BFloat16AttentionForward& params, Isa isa, ParallelFor parallel_for);
void bfloat16_attention_backward(const BFloat16AttentionBackward& params, Isa isa, ParallelFor parallel_for);

}  // namespace evakernels::cpu
