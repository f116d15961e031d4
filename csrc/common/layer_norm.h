// Parameters of the layer_norm launchers. All buffers are dense, row after row.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace evakernels {

struct LayerNormForward {
  const void* x;       // [rows, width], dtype
  const void* weight;  // [width], weight_dtype; null: ones
  const void* bias;    // [width], weight_dtype; null: zeros
  void* y;             // [rows, width], dtype
  float* mean;         // [rows]; not written when rms
  float* rstd;         // [rows]
  int64_t rows;
  int64_t width;
  float eps;
  DType dtype;
  DType weight_dtype;
  bool rms;  // no mean is subtracted: y = x / sqrt(mean(x^2) + eps) * weight + bias
};

struct LayerNormBackward {
  const void* dy;      // [rows, width], dtype
  const void* x;       // [rows, width], dtype
  const void* weight;  // [width], weight_dtype; null: ones
  const float* mean;   // [rows]; not read when rms
  const float* rstd;   // [rows]
  void* dx;            // [rows, width], dtype
  void* dweight;       // [width], weight_dtype; null: not wanted
  void* dbias;         // [width], weight_dtype; null: not wanted
  int64_t rows;
  int64_t width;
  DType dtype;
  DType weight_dtype;
  bool rms;
};

}  // namespace evakernels
