// Parameters of the rope_attention launchers. Those of the CPU: what stands between the matrix products of an
// attention. The products work on a chunk of consecutive heads, packed; head h of sample b is number
// b * heads + h.
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
  const int64_t* token_index;  // [B, N - num_prefix], rows of the tables; null: in order
  int64_t head_stride;         // 0: all heads share a table
  int64_t num_prefix;          // tokens in front that aren't rotated
  bool interleaved;            // partners are neighbours, else half a vector apart
  bool backwards;
};

// packed = factor * rotate(heads), or the other way round.
struct PackHeads {
  HeadsView heads;  // dtype
  void* packed;     // [count, N, D], packed_dtype: float32, or as dtype
  HeadsShape shape;
  Rotation rotation;
  float factor;
  int64_t first;  // of `count` heads
  int64_t count;
  DType dtype;
  DType packed_dtype;
};

// Softmax over the last axis. float32: in place. bfloat16: of the sum of two addends, the first becomes the
// result.
struct AttentionWeights {
  void* scores;             // [rows, N], dtype
  const void* scores_rest;  // [rows, N], bfloat16; null for float32
  float* lse;               // [rows]
  int64_t rows;             // of all heads, one after the other
  int64_t tokens;
  bool causal;
  DType dtype;
};

// The same in backward: scores become weights, and the gradients of the weights become those of the scores.
struct AttentionGradients {
  void* scores;
  const void* scores_rest;
  void* gradients;
  const void* gradients_rest;
  const float* lse;   // [rows]
  const float* mean;  // [rows], of the gradients under the weights
  int64_t rows;
  int64_t tokens;
  bool causal;
  DType dtype;
};

// The dot products of two tensors' vectors.
struct HeadDots {
  HeadsView a;
  HeadsView b;
  float* products;  // [count, N]
  HeadsShape shape;
  int64_t first;
  int64_t count;
  DType dtype;
};

// --- GPU: the whole op -------------------------------------------------------------------------------------

// One entry for each pair of elements.
struct RotaryTables {
  const float* cos;  // [P, D/2] or [H, P, D/2]; null: no rotation
  const float* sin;
  const int64_t* token_index;  // [B, N - num_prefix], rows of the tables; null: in order
  int64_t rows;                // P
  int64_t head_stride;         // 0: all heads share a table
  bool interleaved;            // pairs are neighbours, else half a vector apart
};

struct AttentionShape {
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  int64_t num_prefix;  // tokens in front that aren't rotated
  float scale;
  bool causal;
  DType dtype;
};

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
  void* dq;          // [B, N, H, D], as are dk and dv
  void* dk;
  void* dv;
  RotaryTables tables;
  AttentionShape shape;
};

}  // namespace evakernels
