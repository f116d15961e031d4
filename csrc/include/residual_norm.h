// Parameters of the launchers that join a norm with the residual connection around it. All buffers are dense.
//
//   add + norm   x = residual + scaled(branch),        y = norm(x)
//   norm + add   x = residual + scaled(norm(branch))
//
// scaled multiplies by layer_scale, one factor a column, and by row_scale, one a sample (an even share of the
// rows).
#pragma once

#include <cstdint>

#include "common/api.h"
#include "common/dtype.h"
#include "cpu/isa_namespaces.h"
#include "cpu/parallel.h"
#include "cuda/stream.h"

namespace evakernels {

// A vector of factors or addends; null: it isn't there.
struct ParameterVector {
  const void* data;
  DType dtype;
};

// A gradient to write, in the dtype of its parameter; null: not wanted.
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

// Whether the kernels for GPUs serve such a branch: one dtype is a model's, and a float32 residual with a
// branch of 16 bits is what autocast makes.
inline bool gpu_serves(DType dtype, DType branch_dtype) {
  return branch_dtype == dtype || dtype == DType::Float32;
}

// Whether any kernels serve such a y: that of the residual's dtype, and what autocast makes of a float32
// stream, where branch and y are of the 16 bits that the products around the norm have.
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
  const void* dx;      // [rows, width]: the gradient that reaches the sum beside that of the norm
  const void* x;       // [rows, width]
  const void* branch;  // [rows, width]; read for the gradient of layer_scale only
  const float* mean;   // [rows]; not read when rms
  const float* rstd;   // [rows]
  void* dresidual;     // [rows, width]
  void* dbranch;       // [rows, width]; null: not wanted
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

EVAKERNELS_API void add_norm_forward(const AddNormForward& params, Isa isa, ParallelFor parallel_for);
EVAKERNELS_API void norm_add_forward(const NormAddForward& params, Isa isa, ParallelFor parallel_for);

// The results depend on the shape alone, never on the number of threads.
EVAKERNELS_API void add_norm_backward(const AddNormBackward& params, Isa isa, ParallelFor parallel_for);
EVAKERNELS_API void norm_add_backward(const NormAddBackward& params, Isa isa, ParallelFor parallel_for);

// The parameters as floats. Ones and zeros stand for missing ones, but for layer_scale.
struct ResidualNormVectors {
  const float* weight;       // [width]
  const float* bias;         // [width]
  const float* layer_scale;  // [width]; null: ones
  const float* row_scale;    // [samples]
};

// Sums over rows that the backward pass adds to, [width] each.
struct AddNormSums {
  float* weight;       // null: not wanted
  float* bias;         // null: not wanted
  float* layer_scale;  // null: not wanted
};

// Of g = row_scale * dx. The gradients of all three parameters are multiples of these two.
struct NormAddSums {
  float* gradient;             // g
  float* gradient_normalised;  // g times the normalised row
};

// The row loops of the norms with a residual connection: one table of functions for each instruction set.
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

// `gpu_serves` and `add_norm_serves` list the accepted dtypes. norm + add without a residual accepts the
// dtypes of `norm_serves` (layer_norm.h).
EVAKERNELS_API Error add_norm_forward(const AddNormForward& params, Stream stream);
EVAKERNELS_API Error norm_add_forward(const NormAddForward& params, Stream stream);

// The results depend on the shape and the GPU alone.
EVAKERNELS_API Error add_norm_backward(const AddNormBackward& params, Scratch& scratch, Stream stream);
EVAKERNELS_API Error norm_add_backward(const NormAddBackward& params, Scratch& scratch, Stream stream);

}  // namespace cuda

}  // namespace evakernels
