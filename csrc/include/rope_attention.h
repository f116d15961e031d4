// Parameters of the rope_attention launchers. Head h of sample b is number b * heads + h.
#pragma once

#include <cstdint>

#include "common/api.h"
#include "common/dtype.h"
#include "cpu/isa_namespaces.h"
#include "cpu/parallel.h"
#include "cuda/stream.h"

namespace evakernels {

// A tensor [B, N, H, D] of the caller; distances in elements, those of a vector's D elements are 1.
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

// element' = element * cos + partner * sin. Both tables have one entry for each element, with the signs in
// sin.
struct Rotation {
  const float* cos;  // [P, D] or [H, P, D]; null: no rotation
  const float* sin;
  const int64_t* token_index;  // [B, N - num_prefix], rows of the tables, -1: not rotated; null: in order
  int64_t head_stride;         // 0: all heads share a table
  int64_t num_prefix;          // tokens in front that aren't rotated
  bool interleaved;            // partners are neighbours, else half a vector apart
  bool backwards;
};

// --- CPU: attention of whole heads in bfloat16 -------------------------------------------------------------

struct AttentionOfHeads {
  HeadsShape shape;
  Rotation rotation;
  int64_t count;  // of heads, those of all samples
  float scale;
  bool causal;
};

struct BFloat16AttentionForward {
  HeadsView q;
  HeadsView k;
  HeadsView v;
  HeadsView out;
  float* lse;  // [count, N], lse_stride apart
  int64_t lse_stride;
  AttentionOfHeads of;
};

struct BFloat16AttentionBackward {
  HeadsView dout;
  HeadsView q;
  HeadsView k;
  HeadsView v;
  HeadsView out;
  const float* lse;  // [count, N], lse_stride apart
  int64_t lse_stride;
  HeadsView dq;
  HeadsView dk;
  HeadsView dv;
  AttentionOfHeads of;
};

// --- the whole op -----------------------------------------------------------------------------------------

// One entry for each pair of elements.
struct RotaryTables {
  const float* cos;  // [P, D/2], [H, P, D/2] or, compact, [2, G, D/4]; null: no rotation
  const float* sin;
  // [B, N - num_prefix], of a packed batch [T]: rows of the tables, -1: not rotated. Null: in order, of a
  // packed batch within each sequence.
  const int64_t* token_index;
  int64_t rows;         // P, in the compact form G * G
  int64_t head_stride;  // 0: all heads share a table
  // G of the compact form: row r has its first pairs from [0, r / G], the others from [1, r % G]. 0: not
  // compact.
  int64_t grid;
  bool interleaved;  // pairs are neighbours, else half a vector apart
};

// Of a packed batch: sequence b has the tokens offsets[b] to offsets[b + 1] - 1 of `tokens`.
struct SequenceOffsets {
  const void* data;  // [B + 1]; null: every sample has tokens of its own, as many as the others
  bool is_int64;     // else int32
  int64_t tokens;
};

struct AttentionShape {
  int64_t batch;   // or the sequences of a packed batch
  int64_t tokens;  // of each; of a packed batch no sequence has more
  // Keys of each sample; of a packed batch as `tokens`. There is no rotation unless they are as many as the
  // tokens. A causal query i sees keys up to number i + keys - tokens: the last one sees all.
  int64_t keys;
  int64_t heads;
  int64_t kv_heads;  // of keys and values: head h uses number h / (heads / kv_heads)
  int64_t head_dim;
  int64_t num_prefix;  // tokens in front that aren't rotated
  float scale;
  bool causal;
  DType dtype;
  SequenceOffsets offsets;
};

// Of a packed batch the tensors are [T, H, D] and lse is [H, T]; there is no batch_stride. A query that sees
// no key has an output of zeros and an lse of -inf.
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
  void* dk;          // [B, M, H, D] as dv: those of each query head, which the caller adds up
  void* dv;
  RotaryTables tables;
  AttentionShape shape;
};

namespace cpu {

// Both throw std::invalid_argument for offsets that don't rise from 0 to the number of
// tokens.
EVAKERNELS_API void rope_attention_forward(const RopeAttentionForward& params, Isa isa,
                                           ParallelFor parallel_for);
EVAKERNELS_API void rope_attention_backward(const RopeAttentionBackward& params, Isa isa,
                                            ParallelFor parallel_for);

// Heads [begin, end) of a sample, or of the sequence of a packed batch that begins at token `first` of the
// only sample.
struct SequenceHeads {
  int64_t sample;
  int64_t first;
  int64_t tokens;
  int64_t keys;
  int64_t begin, end;
};

// Of a dense [B, tokens, H, D] or, of a packed batch, [T, H, D].
static inline HeadsView dense_heads(void* data, const AttentionShape& shape, int64_t tokens) {
  const int64_t token_stride = shape.heads * shape.head_dim;
  return {.data = data,
          .batch_stride = tokens * token_stride,
          .token_stride = token_stride,
          .head_stride = shape.head_dim};
}

// From a head's log-sum-exps to those of the next one: they are [B, H, N] or, of a packed batch, [H, T].
static inline int64_t lse_stride(const AttentionShape& shape) {
  return shape.offsets.data != nullptr ? shape.offsets.tokens : shape.tokens;
}

template <class T>
static inline T* lse_of_head(T* lse, const AttentionShape& shape, const SequenceHeads& heads, int64_t head) {
  return lse + (heads.sample * shape.heads + head) * lse_stride(shape) + heads.first;
}

// The loops of rope_attention and packed_attention: one table of functions for each instruction set.
// `workspace`: uninitialized floats, aligned to 64 bytes; forward_workspace and backward_workspace return
// their number for the longest sequence. `rotation`: the tables' rows by token_index, which covers all tokens
// of a packed batch; without a token_index the row is the token's position in its sequence.
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

// On tensor cores: float16 and bfloat16, compute capability 8.0 or later, head_dim up to kMaxHeadDim, up to
// kMaxTokens queries and keys per sequence. An index in token_index or cu_seqlens that is out of range ends
// the launch with an error. A query that sees no key has an output of 0, an lse of -inf and no gradient.
constexpr int kMaxHeadDim = 128;
constexpr int kMaxTokens = 4096;

// Why the kernels don't serve a call; null if they do.
inline Error unserved(const AttentionShape& shape) {
  if (shape.dtype == DType::Float32) {
    return "attention of float32 has no CUDA kernels; those for CPUs, Triton's and the reference serve it";
  }
  if (shape.tokens > kMaxTokens || shape.keys > kMaxTokens) {
    return "a sequence has more tokens than the CUDA kernels serve, 4096";
  }
  if (shape.head_dim > kMaxHeadDim) return "q has more channels a head than the CUDA kernels serve, 128";
  return nullptr;
}

EVAKERNELS_API Error rope_attention_forward(const RopeAttentionForward& params, Stream stream);

// `scratch` holds partial query gradients if a block loops over the keys in several rounds. Results depend on
// the shape and the GPU alone.
EVAKERNELS_API Error rope_attention_backward(const RopeAttentionBackward& params, Scratch& scratch,
                                             Stream stream);

}  // namespace cuda

}  // namespace evakernels
