// The factors and addends of a norm as its kernels read them.
#pragma once

#include "cuda/elements.cuh"
#include "include/residual_norm.h"

namespace evakernels::cuda {

template <int E>
__device__ __forceinline__ void multiply_by(const ParameterVector& factors, int vector, float (&values)[E]) {
  if (!factors.data) return;
  float factor[E];
  load_floats(factors.data, factors.dtype, int64_t{vector} * E, factor);
#pragma unroll
  for (int i = 0; i < E; ++i) values[i] *= factor[i];
}

// The weight, or ones.
template <int E>
__device__ __forceinline__ void load_weight(const ParameterVector& weight, int vector, float (&values)[E]) {
#pragma unroll
  for (int i = 0; i < E; ++i) values[i] = 1.0f;
  if (weight.data) load_floats(weight.data, weight.dtype, int64_t{vector} * E, values);
}

// values * weight + bias.
template <int E>
__device__ __forceinline__ void transform(const ResidualNormParameters& parameters, int vector,
                                          float (&values)[E]) {
  multiply_by(parameters.weight, vector, values);
  if (!parameters.bias.data) return;
  float bias[E];
  load_floats(parameters.bias.data, parameters.bias.dtype, int64_t{vector} * E, bias);
#pragma unroll
  for (int i = 0; i < E; ++i) values[i] += bias[i];
}

__device__ __forceinline__ float row_scale_of(const ResidualNormParameters& parameters, int64_t row,
                                              int64_t rows_per_sample) {
  const ParameterVector& scales = parameters.row_scale;
  float scale[1] = {1.0f};
  if (scales.data) load_floats(scales.data, scales.dtype, row / rows_per_sample, scale);
  return scale[0];
}

__device__ __forceinline__ float parameter_at(const ParameterVector& vector, int64_t column,
                                              float otherwise) {
  float value[1] = {otherwise};
  if (vector.data) load_floats(vector.data, vector.dtype, column, value);
  return value[0];
}

__device__ __forceinline__ void write_gradient(const ParameterGradient& gradient, int64_t column,
                                               float value) {
  if (gradient.data) store_float(gradient.data, gradient.dtype, column, value);
}

}  // namespace evakernels::cuda
