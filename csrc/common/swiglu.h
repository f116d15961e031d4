// Parameters of the swiglu launchers: hidden = silu(gate) * up, and its LayerNorm when there is a norm.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace evakernels {

// Rows of one matrix, `stride` elements apart; each row is dense. Halves of a packed projection are two of
// these.
struct SwigluRows {
  const void* data;
  int64_t stride;
};

struct SwigluForward {
  SwigluRows gate;          // [rows, width], dtype
  SwigluRows up;            // [rows, width], dtype
  const void* norm_weight;  // [width], weight_dtype; null: no norm
  const void* norm_bias;    // [width], weight_dtype; null: zeros
  void* out;                // [rows, width], dtype, dense
  float* mean;              // [rows]; null without a norm
  float* rstd;              // [rows]; null without a norm
  int64_t rows;
  int64_t width;
  float eps;
  DType dtype;
  DType weight_dtype;
};

struct SwigluBackward {
  const void* dout;         // [rows, width], dtype, dense
  SwigluRows gate;          // [rows, width], dtype
  SwigluRows up;            // [rows, width], dtype
  const void* norm_weight;  // [width], weight_dtype; null: no norm
  const float* mean;        // [rows]
  const float* rstd;        // [rows]
  void* dgate;              // [rows, width], dtype, dense
  void* dup;                // [rows, width], dtype, dense
  void* dweight;            // [width], weight_dtype; null: not wanted
  void* dbias;              // [width], weight_dtype; null: not wanted
  int64_t rows;
  int64_t width;
  DType dtype;
  DType weight_dtype;
};

}  // namespace evakernels
