// Parameters of the layer_norm launchers. All buffers are dense, row after row.
#pragma once

#include <cstdint>

#include "common/api.h"
#include "common/dtype.h"
#include "cpu/isa_namespaces.h"
#include "cpu/parallel.h"
#include "cuda/stream.h"

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

namespace cpu {

EVAKERNELS_API void layer_norm_forward(const LayerNormForward& params, Isa isa, ParallelFor parallel_for);

// The result depends on the shape alone, never on the number of threads.
EVAKERNELS_API void layer_norm_backward(const LayerNormBackward& params, Isa isa, ParallelFor parallel_for);

// The row loops of layer_norm: one table of functions for each instruction set.
struct LayerNormKernels {
  // Normalises rows [begin, end). weight and bias replace those of the parameters: never null, [width].
  void (*forward)(const LayerNormForward& params, const float* weight, const float* bias, int64_t begin,
                  int64_t end);

  // Writes dx for rows [begin, end) and adds their share to dweight and dbias, [width] each, either may be
  // null.
  void (*backward)(const LayerNormBackward& params, const float* weight, float* dweight, float* dbias,
                   int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const LayerNormKernels layer_norm;)

}  // namespace cpu

namespace cuda {

EVAKERNELS_API Error layer_norm_forward(const LayerNormForward& params, Stream stream);

// The result depends on the shape and the GPU alone.
EVAKERNELS_API Error layer_norm_backward(const LayerNormBackward& params, Scratch& scratch, Stream stream);

}  // namespace cuda

}  // namespace evakernels
