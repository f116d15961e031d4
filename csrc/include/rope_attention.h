// Parameters of the rope_attention launchers.
#pragma once

#include "include/launcher.h"

namespace evakernels {

// A tensor [B, N, H, D], strides in elements; the stride of the last dimension is 1.
struct HeadsView {
  void* data;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
};

struct HeadsShape {
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
};

// element * cos + partner * sin. The tables have one entry per element, with the signs in sin.
struct Rotation {
  const float* cos;  // [P, D] or [H, P, D]; null: no rotation
  const float* sin;
  const int64_t* token_index;  // [B, N - num_prefix], rows of the tables, -1: not rotated; null: in order
  int64_t head_stride;         // 0: all heads share a table
  int64_t num_prefix;          // first tokens, which aren't rotated
  bool interleaved;            // partners are neighbours, otherwise head_dim / 2 apart
  bool backwards;
};

// One entry per pair of elements.
struct RotaryTables {
  const float* cos;  // [P, D/2] or [H, P, D/2]; null: no rotation
  const float* sin;
  // [B, N - num_prefix], packed [T]: rows of the tables, -1 for tokens that aren't rotated. Null: position in
  // the sequence.
  const int64_t* token_index;
  int64_t rows;         // P
  int64_t head_stride;  // 0: all heads share a table
  bool interleaved;     // pairs are neighbours, otherwise head_dim / 2 apart
};

// Packed batch: sequence b has tokens offsets[b] to offsets[b + 1] - 1 of `tokens`.
struct SequenceOffsets {
  const void* data;  // [B + 1]; null: not packed, all samples have equal lengths
  bool is_int64;     // otherwise int32
  int64_t tokens;
};

struct AttentionShape {
  int64_t batch;   // samples, or sequences of a packed batch
  int64_t tokens;  // per sample; packed: maximum per sequence
  // Keys per sample; packed: as `tokens`. Rotation needs as many keys as tokens. A causal query i attends to
  // keys up to i + keys - tokens, aligned at the bottom right.
  int64_t keys;
  int64_t heads;
  int64_t kv_heads;  // query head h uses key/value head h / (heads / kv_heads)
  int64_t head_dim;
  int64_t num_prefix;  // first tokens, which aren't rotated
  float scale;
  bool causal;
  DType dtype;
  SequenceOffsets offsets;
};

// Packed: tensors are [T, H, D] and lse is [H, T], without a batch_stride. A query that sees no key has an
// output of 0 and an lse of -inf.
struct RopeAttentionForward {
  HeadsView q;
  HeadsView k;
  HeadsView v;
  void* out;   // [B, N, H, D]
  float* lse;  // [B, H, N]
  RotaryTables tables;
  AttentionShape shape;
};

struct RopeAttentionBackward {
  HeadsView dout;
  HeadsView q;
  HeadsView k;
  HeadsView v;
  HeadsView out;
  const float* lse;  // [B, H, N]
  void* dq;          // [B, N, H, D]
  void* dk;          // [B, M, H, D], as dv: per query head, for the caller to sum
  void* dv;
  RotaryTables tables;
  AttentionShape shape;
};

namespace cpu {

// Both throw std::invalid_argument unless the offsets rise from 0 to the number of tokens.
void rope_attention_forward(const RopeAttentionForward& params, Isa isa, ParallelFor parallel_for);
void rope_attention_backward(const RopeAttentionBackward& params, Isa isa, ParallelFor parallel_for);

// Heads [begin, end) of a sample, or of the packed sequence that begins at token `first`.
struct SequenceHeads {
  int64_t sample;
  int64_t first;
  int64_t tokens;
  int64_t keys;
  int64_t begin, end;
};

// View of a dense [B, tokens, H, D] or [T, H, D].
static inline HeadsView dense_heads(void* data, const AttentionShape& shape, int64_t tokens) {
  const int64_t token_stride = shape.heads * shape.head_dim;
  return {.data = data,
          .batch_stride = tokens * token_stride,
          .token_stride = token_stride,
          .head_stride = shape.head_dim};
}

// Stride of heads in lse, [B, H, N] or [H, T].
static inline int64_t lse_stride(const AttentionShape& shape) {
  return shape.offsets.data != nullptr ? shape.offsets.tokens : shape.tokens;
}

template <class T>
static inline T* lse_of_head(T* lse, const AttentionShape& shape, const SequenceHeads& heads, int64_t head) {
  return lse + (heads.sample * shape.heads + head) * lse_stride(shape) + heads.first;
}

// The loops of one instruction set. workspace: uninitialised floats, aligned to 64 bytes, as many as the
// functions of that name return for the longest sequence. rotation: token_index covers all tokens of a packed
// batch.
struct RopeAttentionKernels {
  int64_t (*forward_workspace)(int64_t keys, int64_t head_dim);
  int64_t (*backward_workspace)(int64_t keys, int64_t head_dim);
  void (*forward)(const RopeAttentionForward& params, const Rotation& rotation, float* workspace,
                  const SequenceHeads& heads);
  void (*backward)(const RopeAttentionBackward& params, const Rotation& rotation, float* workspace,
                   const SequenceHeads& heads);
};

EVAKERNELS_FOR_EACH_ISA(extern const RopeAttentionKernels rope_attention;)

}  // namespace cpu

namespace cuda {

// On tensor cores: float16 and bfloat16, compute capability 8.0 or later, up to kMaxTokens queries and keys
// per sequence. An index in token_index or cu_seqlens that is out of range fails the launch.
constexpr int kMaxHeadDim = 128;
constexpr int kMaxTokens = 4096;
// Between tokens, and in a table: offsets within a head are ints.
constexpr int64_t kMaxHeadElements = (int64_t{1} << 29) - 1;

// Why the CUDA kernels don't support a call; null if they do.
inline Error unserved(const AttentionShape& shape, const RotaryTables& tables) {
  if (shape.dtype == DType::Float32) {
    return "attention of float32 has no CUDA kernels; those for CPUs, Triton's and the reference serve it";
  }
  if (shape.tokens > kMaxTokens || shape.keys > kMaxTokens) {
    return "a sequence has more tokens than the CUDA kernels serve, 4096";
  }
  if (shape.head_dim > kMaxHeadDim) return "q has more channels a head than the CUDA kernels serve, 128";
  if (shape.heads * shape.head_dim > kMaxHeadElements ||
      (tables.cos && tables.rows * shape.head_dim / 2 > kMaxHeadElements)) {
    return "tokens or tables of attention are larger than the CUDA kernels serve, 2^29 elements";
  }
  return nullptr;
}

Error rope_attention_forward(const RopeAttentionForward& params, Stream stream);

// scratch: dq, if the keys of a head take several rounds or blocks.
Error rope_attention_backward(const RopeAttentionBackward& params, Scratch& scratch, Stream stream);

}  // namespace cuda

}  // namespace evakernels
