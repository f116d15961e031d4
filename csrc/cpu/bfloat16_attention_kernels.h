// bfloat16 attention of whole heads, on CPUs with dot products of bfloat16 pairs.
#pragma once

#include "include/rope_attention.h"

namespace evakernels::cpu {

// Query rows per task of the forward pass, and per step of the backward pass.
constexpr int64_t kAttentionBlockRows = 96;

constexpr int64_t kMaxAttentionHeadDim = 128;

struct BFloat16Attention {
  HeadsView q, k, v, out;
  float* lse;  // [count, N], lse_stride apart
  int64_t lse_stride;
  HeadsView dout, dq, dk, dv;  // backward only
  HeadsShape shape;
  Rotation rotation;
  int64_t count;  // heads of all samples
  float scale;
  bool causal;
};

// workspace: floats, zeroed and aligned to 64 bytes, as many as the functions of that name return.
struct BFloat16AttentionKernels {
  int64_t (*forward_workspace)(int64_t tokens, int64_t head_dim);
  int64_t (*backward_workspace)(int64_t tokens, int64_t head_dim);

  // Blocks [begin, end) of query rows; those of a head are consecutive.
  void (*forward)(const BFloat16Attention& params, float* workspace, int64_t begin, int64_t end);

  // Heads [begin, end).
  void (*backward)(const BFloat16Attention& params, float* workspace, int64_t begin, int64_t end);
};

namespace avx512_bf16 {
extern const BFloat16AttentionKernels bfloat16_attention;
}
namespace amx {
extern const BFloat16AttentionKernels bfloat16_attention;
}

}  // namespace evakernels::cpu
