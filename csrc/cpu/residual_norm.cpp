#include "include/residual_norm.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

// The parameters as floats.
class FloatParameters {
 public:
  FloatParameters(const ResidualNormParameters& parameters, const ResidualNormShape& shape)
      : weight_(parameters.weight.data, parameters.weight.dtype, shape.width, 1.0f),
        bias_(parameters.bias.data, parameters.bias.dtype, shape.width, 0.0f),
        has_layer_scale_(parameters.layer_scale.data != nullptr),
        layer_scale_(parameters.layer_scale.data, parameters.layer_scale.dtype,
                     has_layer_scale_ ? shape.width : 0, 1.0f),
        row_scale_(parameters.row_scale.data, parameters.row_scale.dtype, samples(shape), 1.0f) {}

  ResidualNormVectors vectors() const {
    const float* layer_scale = has_layer_scale_ ? layer_scale_.data() : nullptr;
    return {weight_.data(), bias_.data(), layer_scale, row_scale_.data()};
  }

 private:
  static int64_t samples(const ResidualNormShape& shape) {
    return ceil_div(shape.rows, std::max<int64_t>(1, shape.rows_per_sample));
  }

  FloatVector weight_;
  FloatVector bias_;
  bool has_layer_scale_;
  FloatVector layer_scale_;
  FloatVector row_scale_;
};

ChunkedSum chunked_sum(const ParameterGradient& gradient, const RowChunks& chunks) {
  return {gradient.data, gradient.dtype, chunks.count, chunks.width};
}

void store_all(const ParameterGradient& gradient, const AlignedFloats& values) {
  for (int64_t i = 0; i < values.size(); ++i) store_as(gradient.dtype, gradient.data, i, values[i]);
}

float layer_scale_at(const ResidualNormVectors& vectors, int64_t i) {
  return vectors.layer_scale ? vectors.layer_scale[i] : 1.0f;
}

// With g = row_scale * dx and n the normalised row: dweight = layer_scale * sum(g n), dbias = layer_scale *
// sum(g), dlayer_scale = weight * sum(g n) + bias * sum(g).
void write_gradients(const ResidualNormGradients& gradients, const ResidualNormVectors& vectors,
                     const AlignedFloats& sum, const AlignedFloats& sum_normalised) {
  const int64_t width = sum.size();
  AlignedFloats values(width);
  if (gradients.weight.data) {
    for (int64_t i = 0; i < width; ++i) values[i] = layer_scale_at(vectors, i) * sum_normalised[i];
    store_all(gradients.weight, values);
  }
  if (gradients.bias.data) {
    for (int64_t i = 0; i < width; ++i) values[i] = layer_scale_at(vectors, i) * sum[i];
    store_all(gradients.bias, values);
  }
  if (gradients.layer_scale.data) {
    for (int64_t i = 0; i < width; ++i) {
      values[i] = vectors.weight[i] * sum_normalised[i] + vectors.bias[i] * sum[i];
    }
    store_all(gradients.layer_scale, values);
  }
}

}  // namespace

void add_norm_forward(const AddNormForward& params, Isa isa, ParallelFor parallel_for) {
  const ResidualNormKernels& kernels = EVAKERNELS_OF_ISA(isa, residual_norm);
  const int64_t width = params.shape.width;
  const FloatParameters parameters(params.parameters, params.shape);
  run_parallel(parallel_for, params.shape.rows, tasks_grain(width), [&](int64_t begin, int64_t end) {
    AlignedFloats scratch(width);
    kernels.add_norm_forward(params, parameters.vectors(), scratch.data(), begin, end);
  });
}

void norm_add_forward(const NormAddForward& params, Isa isa, ParallelFor parallel_for) {
  const ResidualNormKernels& kernels = EVAKERNELS_OF_ISA(isa, residual_norm);
  const FloatParameters parameters(params.parameters, params.shape);
  run_parallel(parallel_for, params.shape.rows, tasks_grain(params.shape.width),
               [&](int64_t begin, int64_t end) {
                 kernels.norm_add_forward(params, parameters.vectors(), begin, end);
               });
}

void add_norm_backward(const AddNormBackward& params, Isa isa, ParallelFor parallel_for) {
  const ResidualNormKernels& kernels = EVAKERNELS_OF_ISA(isa, residual_norm);
  const FloatParameters parameters(params.parameters, params.shape);
  const RowChunks chunks(params.shape.rows, params.shape.width);
  ChunkedSum dweight = chunked_sum(params.gradients.weight, chunks);
  ChunkedSum dbias = chunked_sum(params.gradients.bias, chunks);
  ChunkedSum dlayer_scale = chunked_sum(params.gradients.layer_scale, chunks);
  chunks.run(parallel_for, [&](int64_t chunk, int64_t first, int64_t last) {
    const AddNormSums sums = {dweight.row(chunk), dbias.row(chunk), dlayer_scale.row(chunk)};
    kernels.add_norm_backward(params, parameters.vectors(), sums, first, last);
  });
  dweight.write_total(parallel_for);
  dbias.write_total(parallel_for);
  dlayer_scale.write_total(parallel_for);
}

void norm_add_backward(const NormAddBackward& params, Isa isa, ParallelFor parallel_for) {
  const ResidualNormKernels& kernels = EVAKERNELS_OF_ISA(isa, residual_norm);
  const FloatParameters parameters(params.parameters, params.shape);
  const ResidualNormVectors vectors = parameters.vectors();
  const ResidualNormGradients& gradients = params.gradients;
  const int64_t width = params.shape.width;
  AlignedFloats scaled_weight(width);
  for (int64_t i = 0; i < width; ++i) scaled_weight[i] = vectors.weight[i] * layer_scale_at(vectors, i);

  const bool needed = gradients.any_wanted();
  AlignedFloats total(needed ? width : 0), total_normalised(needed ? width : 0);
  const RowChunks chunks(params.shape.rows, params.shape.width);
  ChunkedSum sum = chunked_sum({needed ? total.data() : nullptr, DType::Float32}, chunks);
  ChunkedSum sum_normalised =
      chunked_sum({needed ? total_normalised.data() : nullptr, DType::Float32}, chunks);
  chunks.run(parallel_for, [&](int64_t chunk, int64_t first, int64_t last) {
    const NormAddSums sums = {sum.row(chunk), sum_normalised.row(chunk)};
    kernels.norm_add_backward(params, scaled_weight.data(), vectors.row_scale, sums, first, last);
  });
  sum.write_total(parallel_for);
  sum_normalised.write_total(parallel_for);
  write_gradients(gradients, vectors, total, total_normalised);
}

}  // namespace evakernels::cpu
