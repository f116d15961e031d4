// Parameters of the layer_norm launchers. All buffers are dense, row after row.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace evakernels {

struct LayerNormForward {
  const void* x;       // [rows, width], dtype
  const void* weight;  // [width], weight_dtype; null: ones
  const void* bias;    // [width], weight_dtype; null: zeros
  void* y;             // [rows, width], y_dtype
  float* mean;         // [rows]; not written when rms
  float* rstd;         // [rows]
  int64_t rows;
  int64_t width;
  float eps;
  DType dtype;
  DType y_dtype;
  DType weight_dtype;
  bool rms;  // no mean is subtracted: y = x / sqrt(mean(x^2) + eps) * weight + bias
};

struct LayerNormBackward {
  const void* dy;      // [rows, width], y_dtype
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
  DType y_dtype;
  DType weight_dtype;
  bool rms;
};

// Whether there are kernels that read rows of one dtype and write them in the other: 16 bits become float32
// and float32 becomes 16 bits, but no 16 bits the other ones.
inline bool norm_serves(DType a, DType b) { return a == b || a == DType::Float32 || b == DType::Float32; }

}  // namespace evakernels
