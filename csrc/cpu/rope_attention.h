// What stands between the matrix products of an attention with rotary embedding, on the CPU.
#pragma once

#include "common/rope_attention.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace evakernels::cpu {

void pack_heads(const PackHeads& params, Isa isa, ParallelFor parallel_for);
void unpack_heads(const PackHeads& params, Isa isa, ParallelFor parallel_for);
void attention_weights(const AttentionWeights& params, Isa isa, ParallelFor parallel_for);
void attention_gradients(const AttentionGradients& params, Isa isa, ParallelFor parallel_for);
void head_dots(const HeadDots& params, Isa isa, ParallelFor parallel_for);

}  // namespace evakernels::cpu
