#include "cpu/bfloat16_attention.h"

#include "cpu/bfloat16_attention_kernels.h"
#include "cpu/rows.h"

namespace evakernels::cpu {

#ifdef EVAKERNELS_X86

namespace {

const BFloat16AttentionKernels& kernels_for([[maybe_unused]] Isa isa) {
#ifdef EVAKERNELS_AMX
  if (isa == Isa::Amx) return amx::bfloat16_attention;
#endif
  return avx512_bf16::bfloat16_attention;
}

}  // namespace

bool has_bfloat16_attention(Isa isa, const HeadsShape& shape) {
  constexpr int64_t kMinTokens = 32, kMinHeadDim = 32;
  return isa >= Isa::Avx512Bf16 && shape.tokens >= kMinTokens && shape.head_dim >= kMinHeadDim &&
         shape.head_dim <= kMaxAttentionHeadDim;
}

void bfloat16_attention_forward(const BFloat16AttentionForward& params, Isa isa, ParallelFor parallel_for) {
  const BFloat16AttentionKernels& kernels = kernels_for(isa);
  const HeadsShape& shape = params.of.shape;
  const int64_t rows = std::min(shape.tokens, kAttentionBlockRows);
  const int64_t tasks = params.of.count * ceil_div(shape.tokens, kAttentionBlockRows);
  run_parallel(parallel_for, tasks, tasks_grain(rows * (shape.tokens + shape.head_dim)),
               [&](int64_t begin, int64_t end) {
                 AlignedFloats workspace(kernels.forward_workspace(shape), 0.0f);
                 kernels.forward(params, workspace.data(), begin, end);
               });
}

void bfloat16_attention_backward(const BFloat16AttentionBackward& params, Isa isa, ParallelFor parallel_for) {
  const BFloat16AttentionKernels& kernels = kernels_for(isa);
  const HeadsShape& shape = params.of.shape;
  const int64_t grain = tasks_grain(shape.tokens * (shape.tokens + shape.head_dim));
  run_parallel(parallel_for, params.of.count, grain, [&](int64_t begin, int64_t end) {
    AlignedFloats workspace(kernels.backward_workspace(shape), 0.0f);
    kernels.backward(params, workspace.data(), begin, end);
  });
}

#else

bool has_bfloat16_attention(Isa, const HeadsShape&) { return false; }
void bfloat16_attention_forward(const BFloat16AttentionForward&, Isa, ParallelFor) {}
void bfloat16_attention_backward(const BFloat16AttentionBackward&, Isa, ParallelFor) {}

#endif

}  // namespace evakernels::cpu
