#include "include/layer_norm.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

// The parameters as floats.
class FloatParameters {
 public:
  FloatParameters(const NormParameters& parameters, const NormShape& shape)
      : weight_(parameters.weight.data, parameters.weight.dtype, shape.width, 1.0f),
        bias_(parameters.bias.data, parameters.bias.dtype, shape.width, 0.0f),
        layer_scale_(scale(parameters.layer_scale, shape.width)),
        row_scale_(scale(parameters.row_scale,
                         shape.rows_per_sample == 0 ? 0 : shape.rows / shape.rows_per_sample)) {}

  NormVectors vectors() const {
    return {weight_.data(), bias_.data(), layer_scale_.data(), row_scale_.data()};
  }

 private:
  static FloatVector scale(const ParameterVector& vector, int64_t size) {
    return {vector.data, vector.dtype, vector.data ? size : 0, 1.0f};
  }

  FloatVector weight_;
  FloatVector bias_;
  FloatVector layer_scale_;
  FloatVector row_scale_;
};

ChunkedSum chunked_sum(const ParameterGradient& gradient, const RowChunks& chunks) {
  return {gradient.data, gradient.dtype, chunks.count, chunks.width};
}

void store_all(const ParameterGradient& gradient, const AlignedFloats& values) {
  for (int64_t i = 0; i < values.size(); ++i) store_as(gradient.dtype, gradient.data, i, values[i]);
}

// Gradients from the sums of norm + add with a layer_scale: dweight = layer_scale * sum(g n), dbias =
// layer_scale * sum(g), dlayer_scale = weight * sum(g n) + bias * sum(g), with g = row_scale * dy and n the
// normalised row.
void write_gradients(const NormGradients& gradients, const NormVectors& vectors, const AlignedFloats& sum,
                     const AlignedFloats& sum_normalised, int64_t width) {
  AlignedFloats values(width);
  if (gradients.weight.data) {
    for (int64_t i = 0; i < width; ++i) values[i] = vectors.layer_scale[i] * sum_normalised[i];
    store_all(gradients.weight, values);
  }
  if (gradients.bias.data) {
    for (int64_t i = 0; i < width; ++i) values[i] = vectors.layer_scale[i] * sum[i];
    store_all(gradients.bias, values);
  }
  if (gradients.layer_scale.data) {
    for (int64_t i = 0; i < width; ++i) {
      values[i] = vectors.weight[i] * sum_normalised[i] + vectors.bias[i] * sum[i];
    }
    store_all(gradients.layer_scale, values);
  }
}

// Runs the loops and writes the sums as the given gradients.
void run_backward(const LayerNormBackward& params, const NormVectors& vectors, const NormGradients& sums,
                  Isa isa, ParallelFor parallel_for) {
  const LayerNormKernels& kernels = EVAKERNELS_OF_ISA(isa, layer_norm);
  const RowChunks chunks(params.shape.rows, params.shape.width);
  ChunkedSum weight = chunked_sum(sums.weight, chunks);
  ChunkedSum bias = chunked_sum(sums.bias, chunks);
  ChunkedSum layer_scale = chunked_sum(sums.layer_scale, chunks);
  chunks.run(parallel_for, [&](int64_t chunk, int64_t first, int64_t last) {
    const NormSums rows = {weight.row(chunk), bias.row(chunk), layer_scale.row(chunk)};
    kernels.backward(params, vectors, rows, first, last);
  });
  weight.write_total(parallel_for);
  bias.write_total(parallel_for);
  layer_scale.write_total(parallel_for);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& params, Isa isa, ParallelFor parallel_for) {
  const LayerNormKernels& kernels = EVAKERNELS_OF_ISA(isa, layer_norm);
  const int64_t width = params.shape.width;
  const FloatParameters parameters(params.parameters, params.shape);
  run_parallel(parallel_for, params.shape.rows, tasks_grain(width), [&](int64_t begin, int64_t end) {
    AlignedFloats scratch(params.shape.add_first ? width : 0);
    kernels.forward(params, parameters.vectors(), scratch.data(), begin, end);
  });
}

void layer_norm_backward(const LayerNormBackward& params, Isa isa, ParallelFor parallel_for) {
  const FloatParameters parameters(params.parameters, params.shape);
  const NormVectors vectors = parameters.vectors();
  const NormGradients& gradients = params.gradients;
  if (params.shape.add_first || !vectors.layer_scale) {
    return run_backward(params, vectors, gradients, isa, parallel_for);
  }
  const int64_t width = params.shape.width;
  AlignedFloats scaled_weight(width);
  for (int64_t i = 0; i < width; ++i) scaled_weight[i] = vectors.weight[i] * vectors.layer_scale[i];
  NormVectors scaled = vectors;
  scaled.weight = scaled_weight.data();

  const bool needs_sum = gradients.bias.data || gradients.layer_scale.data;
  const bool needs_normalised = gradients.weight.data || gradients.layer_scale.data;
  AlignedFloats sum(needs_sum ? width : 0), sum_normalised(needs_normalised ? width : 0);
  const NormGradients sums = {
      .weight = {needs_normalised ? sum_normalised.data() : nullptr, DType::Float32},
      .bias = {needs_sum ? sum.data() : nullptr, DType::Float32},
      .layer_scale = {},
  };
  run_backward(params, scaled, sums, isa, parallel_for);
  write_gradients(gradients, vectors, sum, sum_normalised, width);
}

}  // namespace evakernels::cpu
