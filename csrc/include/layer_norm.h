// Parameters of the layer_norm launchers. All buffers are dense.
#pragma once

#include "include/launcher.h"

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
  void* dweight;       // [width], weight_dtype; null: not needed
  void* dbias;         // [width], weight_dtype; null: not needed
  int64_t rows;
  int64_t width;
  DType dtype;
  DType y_dtype;
  DType weight_dtype;
  bool rms;
};

// Whether there are kernels for x and y of these dtypes: equal ones, or 16 bits with float32.
inline bool norm_serves(DType a, DType b) { return a == b || a == DType::Float32 || b == DType::Float32; }

namespace cpu {

void layer_norm_forward(const LayerNormForward& params, Isa isa, ParallelFor parallel_for);

// The result doesn't depend on the number of threads.
void layer_norm_backward(const LayerNormBackward& params, Isa isa, ParallelFor parallel_for);

// The loops of one instruction set.
struct LayerNormKernels {
  // Rows [begin, end). weight, bias: [width] floats, in place of the parameters'; never null.
  void (*forward)(const LayerNormForward& params, const float* weight, const float* bias, int64_t begin,
                  int64_t end);

  // Writes dx for rows [begin, end) and adds their share to dweight and dbias, [width] or null.
  void (*backward)(const LayerNormBackward& params, const float* weight, float* dweight, float* dbias,
                   int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const LayerNormKernels layer_norm;)

}  // namespace cpu

namespace cuda {

Error layer_norm_forward(const LayerNormForward& params, Stream stream);

Error layer_norm_backward(const LayerNormBackward& params, Scratch& scratch, Stream stream);

}  // namespace cuda

}  // namespace evakernels
