// Parameters of the launchers that fuse a norm with the residual connection around it. All buffers are dense.
//
//   add + norm   x = residual + scaled(branch),        y = norm(x)
//   norm + add   x = residual + scaled(norm(branch))
//
// scaled multiplies by layer_scale, one factor per column, and by row_scale, one per sample.
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

struct ResidualNormParameters {
  ParameterVector weight;       // [width]
  ParameterVector bias;         // [width]
  ParameterVector layer_scale;  // [width]
  ParameterVector row_scale;    // [rows / rows_per_sample]
};

struct ResidualNormGradients {
  ParameterGradient weight;       // [width]
  ParameterGradient bias;         // [width]
  ParameterGradient layer_scale;  // [width]

  bool any_wanted() const { return weight.data || bias.data || layer_scale.data; }
};

struct ResidualNormShape {
  int64_t rows;
  int64_t width;
  int64_t rows_per_sample;
  DType dtype;         // of the residual, the sum x and their gradients
  DType branch_dtype;  // of the branch and its gradient
  DType y_dtype;       // of y and its gradient, in add + norm
  bool rms;            // no mean is subtracted
};

// Whether there are GPU kernels: for equal dtypes, and for a float32 residual with a 16-bit branch, as under
// autocast.
inline bool gpu_serves(DType dtype, DType branch_dtype) {
  return branch_dtype == dtype || dtype == DType::Float32;
}

// Whether there are kernels for y: of the residual's dtype, or for a float32 residual of the branch's, as
// under autocast.
inline bool add_norm_serves(const ResidualNormShape& shape) {
  return shape.y_dtype == shape.dtype ||
         (shape.dtype == DType::Float32 && shape.y_dtype == shape.branch_dtype);
}

struct AddNormForward {
  const void* residual;  // [rows, width]
  const void* branch;    // [rows, width]
  void* y;               // [rows, width], y_dtype
  void* x;               // [rows, width]
  float* mean;           // [rows]; not written when rms
  float* rstd;           // [rows]
  float eps;
  ResidualNormParameters parameters;
  ResidualNormShape shape;
};

struct AddNormBackward {
  const void* dy;      // [rows, width], y_dtype
  const void* dx;      // [rows, width]: the gradient that reaches x past the norm
  const void* x;       // [rows, width]
  const void* branch;  // [rows, width]; read for the gradient of layer_scale only
  const float* mean;   // [rows]; not read when rms
  const float* rstd;   // [rows]
  void* dresidual;     // [rows, width]
  void* dbranch;       // [rows, width]; null if not needed
  ResidualNormParameters parameters;
  ResidualNormGradients gradients;
  ResidualNormShape shape;
};

struct NormAddForward {
  const void* residual;  // [rows, width]
  const void* branch;    // [rows, width]
  void* x;               // [rows, width]
  float* mean;           // [rows]; not written when rms
  float* rstd;           // [rows]
  float eps;
  ResidualNormParameters parameters;
  ResidualNormShape shape;
};

struct NormAddBackward {
  const void* dx;      // [rows, width]
  const void* branch;  // [rows, width]
  const float* mean;   // [rows]; not read when rms
  const float* rstd;   // [rows]
  void* dbranch;       // [rows, width]
  ResidualNormParameters parameters;
  ResidualNormGradients gradients;
  ResidualNormShape shape;
};

namespace cpu {

void add_norm_forward(const AddNormForward& params, Isa isa, ParallelFor parallel_for);
void norm_add_forward(const NormAddForward& params, Isa isa, ParallelFor parallel_for);

// The results don't depend on the number of threads.
void add_norm_backward(const AddNormBackward& params, Isa isa, ParallelFor parallel_for);
void norm_add_backward(const NormAddBackward& params, Isa isa, ParallelFor parallel_for);

// The parameters as floats; ones or zeros for missing ones, but null for layer_scale.
struct ResidualNormVectors {
  const float* weight;       // [width]
  const float* bias;         // [width]
  const float* layer_scale;  // [width]; null: ones
  const float* row_scale;    // [samples]
};

// Sums over rows that the backward pass accumulates, [width] each; null if not needed.
struct AddNormSums {
  float* weight;       // null: not needed
  float* bias;         // null: not needed
  float* layer_scale;  // null: not needed
};

// Sums of g = row_scale * dx, from which all parameter gradients follow.
struct NormAddSums {
  float* gradient;             // g
  float* gradient_normalised;  // g * normalised
};

// The loops of one instruction set.
struct ResidualNormKernels {
  // Rows [begin, end). scratch: width floats.
  void (*add_norm_forward)(const AddNormForward& params, const ResidualNormVectors& vectors, float* scratch,
                           int64_t begin, int64_t end);
  void (*norm_add_forward)(const NormAddForward& params, const ResidualNormVectors& vectors, int64_t begin,
                           int64_t end);

  void (*add_norm_backward)(const AddNormBackward& params, const ResidualNormVectors& vectors,
                            const AddNormSums& sums, int64_t begin, int64_t end);
  // scaled_weight: weight * layer_scale, [width].
  void (*norm_add_backward)(const NormAddBackward& params, const float* scaled_weight, const float* row_scale,
                            const NormAddSums& sums, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const ResidualNormKernels residual_norm;)

}  // namespace cpu

namespace cuda {

// Dtypes: gpu_serves and add_norm_serves; norm + add without a residual: norm_serves (layer_norm.h).
Error add_norm_forward(const AddNormForward& params, Stream stream);
Error norm_add_forward(const NormAddForward& params, Stream stream);

Error add_norm_backward(const AddNormBackward& params, Scratch& scratch, Stream stream);
Error norm_add_backward(const NormAddBackward& params, Scratch& scratch, Stream stream);

}  // namespace cuda

}  // namespace evakernels
