// Parameters of the rope_attention launchers. Head h of sample b is number b * heads + h.
#pragma once

#include <cstdint>

#include "common/dtype.h"

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

}  // namespace evakernels
