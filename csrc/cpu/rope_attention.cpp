#include "cpu/rope_attention.h"

#include "cpu/rope_attention_kernels.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

const RopeAttentionKernels& kernels_for(Isa isa) { return EVAKERNELS_OF_ISA(isa, rope_attention); }

}  // namespace

void pack_heads(const PackHeads& params, Isa isa, ParallelFor parallel_for) {
  const auto pack = kernels_for(isa).pack;
  run_parallel(parallel_for, params.count * params.shape.tokens, tasks_grain(params.shape.head_dim),
               [&](int64_t begin, int64_t end) { pack(params, begin, end); });
}

void unpack_heads(const PackHeads& params, Isa isa, ParallelFor parallel_for) {
  const auto unpack = kernels_for(isa).unpack;
  run_parallel(parallel_for, params.count * params.shape.tokens, tasks_grain(params.shape.head_dim),
               [&](int64_t begin, int64_t end) { unpack(params, begin, end); });
}

void attention_weights(const AttentionWeights& params, Isa isa, ParallelFor parallel_for) {
  const auto weights = kernels_for(isa).weights;
  run_parallel(parallel_for, params.rows, tasks_grain(params.keys),
               [&](int64_t begin, int64_t end) { weights(params, begin, end); });
}

void attention_gradients(const AttentionGradients& params, Isa isa, ParallelFor parallel_for) {
  const auto gradients = kernels_for(isa).gradients;
  run_parallel(parallel_for, params.rows, tasks_grain(params.keys),
               [&](int64_t begin, int64_t end) { gradients(params, begin, end); });
}

void head_dots(const HeadDots& params, Isa isa, ParallelFor parallel_for) {
  const auto dots = kernels_for(isa).dots;
  run_parallel(parallel_for, params.count * params.shape.tokens, tasks_grain(params.shape.head_dim),
               [&](int64_t begin, int64_t end) { dots(params, begin, end); });
}

}  // namespace evakernels::cpu
