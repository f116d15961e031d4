// Parameters of the layer_norm launchers: a norm, alone or with a residual connection. All buffers are dense.
//
//   norm         y = norm(x)
//   add + norm   total = residual + scaled(x),  y = norm(total)
//   norm + add   y = residual + scaled(norm(x))
//
// scaled multiplies by layer_scale, one factor per column, and by row_scale, one per sample. A norm alone has
// neither.
#pragma once

#include "include/launcher.h"

namespace evakernels {

// A parameter; null if there is none.
struct ParameterVector {
  const void* data;
  DType dtype;
};

// A gradient to write, in the dtype of its parameter; null if not needed.
struct ParameterGradient {
  void* data;
  DType dtype;
};

struct NormParameters {
  ParameterVector weight;       // [width]
  ParameterVector bias;         // [width]
  ParameterVector layer_scale;  // [width]
  ParameterVector row_scale;    // [rows / rows_per_sample]
};

struct NormGradients {
  ParameterGradient weight;       // [width]
  ParameterGradient bias;         // [width]
  ParameterGradient layer_scale;  // [width]

  bool any_wanted() const { return weight.data || bias.data || layer_scale.data; }
};

struct NormShape {
  int64_t rows;
  int64_t width;
  int64_t rows_per_sample;
  DType dtype;         // of residual and total; without add_first of y
  DType branch_dtype;  // of the forward pass's x
  DType y_dtype;
  bool rms;        // no mean is subtracted
  bool add_first;  // add + norm
};

// Whether there are kernels for y of add + norm: of the residual's dtype, or for a float32 residual of the
// branch's, as under autocast. Other forms have kernels for all dtypes.
inline bool norm_serves(const NormShape& shape) {
  return shape.y_dtype == shape.dtype ||
         (shape.add_first && shape.dtype == DType::Float32 && shape.y_dtype == shape.branch_dtype);
}

// Whether there are GPU kernels: for equal dtypes, for float32 with a 16-bit branch, as under autocast, and
// without add_first for 16 bits with a float32 x.
inline bool gpu_serves(const NormShape& shape) {
  return shape.branch_dtype == shape.dtype || shape.dtype == DType::Float32 ||
         (!shape.add_first && shape.branch_dtype == DType::Float32);
}

struct LayerNormForward {
  const void* residual;  // [rows, width]; null: a norm alone
  const void* x;         // [rows, width]
  void* y;               // [rows, width]
  float* mean;           // [rows]; not written when rms
  float* rstd;           // [rows]
  float eps;
  NormParameters parameters;
  NormShape shape;
  void* total;  // [rows, width]; written with add_first
};

struct LayerNormBackward {
  const void* dy;      // [rows, width]
  const void* dtotal;  // [rows, width]: with add_first, the gradient that reaches total past the norm
  const void* x;       // [rows, width], the norm's input: with add_first the forward pass's total
  const void* branch;  // [rows, width]: with add_first, the forward pass's x, for the gradient of layer_scale
  const float* mean;   // [rows]; not read when rms
  const float* rstd;   // [rows]
  void* dx;            // [rows, width]: the gradient of x
  void* dbranch;       // [rows, width], with add_first; null if not needed
  NormParameters parameters;
  NormGradients gradients;
  NormShape shape;
};

namespace cpu {

void layer_norm_forward(const LayerNormForward& params, Isa isa, ParallelFor parallel_for);

// The result doesn't depend on the number of threads.
void layer_norm_backward(const LayerNormBackward& params, Isa isa, ParallelFor parallel_for);

// The parameters as floats; ones or zeros for missing ones, but null for the scales.
struct NormVectors {
  const float* weight;       // [width]
  const float* bias;         // [width]
  const float* layer_scale;  // [width]; null: ones
  const float* row_scale;    // [samples]; null: ones
};

// Sums over rows, [width] each; null if not needed. Without add_first, of g = row_scale * dy: weight sums
// g * normalised and bias g, from which the gradients of all parameters follow.
struct NormSums {
  float* weight;
  float* bias;
  float* layer_scale;  // with add_first
};

// The loops of one instruction set, over rows [begin, end).
struct LayerNormKernels {
  // scratch: width floats, with add_first.
  void (*forward)(const LayerNormForward& params, NormVectors vectors, float* scratch, int64_t begin,
                  int64_t end);

  // vectors.weight: without add_first, weight * layer_scale.
  void (*backward)(const LayerNormBackward& params, NormVectors vectors, NormSums sums, int64_t begin,
                   int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const LayerNormKernels layer_norm;)

}  // namespace cpu

namespace cuda {

Error layer_norm_forward(const LayerNormForward& params, Stream stream);

Error layer_norm_backward(const LayerNormBackward& params, Scratch& scratch, Stream stream);

// With add_first.
Error add_norm_forward(const LayerNormForward& params, Stream stream);
Error add_norm_backward(const LayerNormBackward& params, Scratch& scratch, Stream stream);

}  // namespace cuda

}  // namespace evakernels
