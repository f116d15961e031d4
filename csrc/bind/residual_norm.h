// The params of the norms with a residual connection from arrays, dense ones.
#pragma once

#include "bind/array.h"
#include "common/residual_norm.h"

namespace evakernels {

// What scales and shifts, and what is known of a call's shape.
struct ResidualNormArrays {
  Array weight, bias, layer_scale, row_scale;

  ResidualNormParameters checked(const Array& x) const {
    const auto vector = [](const Array& array, int64_t size) -> ParameterVector {
      require(!array || (array.sizes.size() == 1 && array.sizes[0] == size),
              std::string(array.name) + " must have " + std::to_string(size) + " elements");
      return {array.data, array.dtype};
    };
    const int64_t width = x.sizes.back();
    return {vector(weight, width), vector(bias, width), vector(layer_scale, width),
            vector(row_scale, x.sizes[0])};
  }
};

// `y`: what add + norm writes beside the sum, or its gradient; in norm + add the sum.
inline ResidualNormShape residual_norm_shape(const Array& x, const Array& branch, const Array& y, bool rms) {
  require(x.sizes.size() > 1, std::string(x.name) + " must be [B, ..., C]");
  const RowSizes size(x);
  const int64_t samples = x.sizes[0];
  return {
      .rows = size.rows,
      .width = size.width,
      .rows_per_sample = samples == 0 ? 0 : size.rows / samples,
      .dtype = x.dtype,
      .branch_dtype = branch.dtype,
      .y_dtype = y.dtype,
      .rms = rms,
  };
}

// The shape of add + norm, whose y the kernels serve.
inline ResidualNormShape add_norm_shape(const Array& x, const Array& branch, const Array& y, bool rms) {
  const ResidualNormShape shape = residual_norm_shape(x, branch, y, rms);
  require_sizes(y, x.sizes);
  require(add_norm_serves(shape),
          std::string(y.name) + " is " + name_of(y.dtype) + " beside " + name_of(x.dtype) +
              " and a branch of " + name_of(branch.dtype) +
              "; the kernels take the residual's dtype, or beside a float32 residual the "
              "branch's");
  return shape;
}

// A gradient of a parameter, [width]; one that doesn't exist isn't wanted.
struct ResidualNormGradientArrays {
  Array weight, bias, layer_scale;

  ResidualNormGradients checked(int64_t width) const {
    const auto gradient = [&](const Array& array) -> ParameterGradient {
      if (array) require_sizes(array, {width});
      return {array.data, array.dtype};
    };
    return {gradient(weight), gradient(bias), gradient(layer_scale)};
  }
};

inline AddNormForward add_norm_forward_params(const Array& residual, const Array& branch,
                                              const ResidualNormArrays& parameters, const Array& y,
                                              const Array& x, const Array& mean, const Array& rstd,
                                              double eps, bool rms) {
  const ResidualNormShape shape = add_norm_shape(residual, branch, y, rms);
  require_sizes(branch, residual.sizes);
  require_like(x, residual);
  require_statistics(mean, rstd, shape.rows, !rms);
  return {
      .residual = residual.data,
      .branch = branch.data,
      .y = y.data,
      .x = x.data,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .eps = static_cast<float>(eps),
      .parameters = parameters.checked(residual),
      .shape = shape,
  };
}

// Unless layer_scale's gradient is wanted, only the branch's dtype counts.
inline AddNormBackward add_norm_backward_params(const Array& dy, const Array& dx, const Array& x,
                                                const Array& branch, const ResidualNormArrays& parameters,
                                                const Array& mean, const Array& rstd, const Array& dresidual,
                                                const Array& dbranch,
                                                const ResidualNormGradientArrays& gradients, bool rms) {
  const ResidualNormShape shape = add_norm_shape(x, branch, dy, rms);
  for (const Array* array : {&dx, &dresidual}) require_like(*array, x);
  if (gradients.layer_scale) require_sizes(branch, x.sizes);
  if (dbranch) {
    require_sizes(dbranch, x.sizes);
    require_dtype(dbranch, branch.dtype);
  }
  require_statistics(mean, rstd, shape.rows, !rms);
  return {
      .dy = dy.data,
      .dx = dx.data,
      .x = x.data,
      .branch = gradients.layer_scale ? branch.data : nullptr,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .dresidual = dresidual.data,
      .dbranch = dbranch.data,
      .parameters = parameters.checked(x),
      .gradients = gradients.checked(shape.width),
      .shape = shape,
  };
}

inline NormAddForward norm_add_forward_params(const Array& residual, const Array& branch,
                                              const ResidualNormArrays& parameters, const Array& x,
                                              const Array& mean, const Array& rstd, double eps, bool rms) {
  const ResidualNormShape shape = residual_norm_shape(residual, branch, x, rms);
  require_sizes(branch, residual.sizes);
  require_like(x, residual);
  require_statistics(mean, rstd, shape.rows, !rms);
  return {
      .residual = residual.data,
      .branch = branch.data,
      .x = x.data,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .eps = static_cast<float>(eps),
      .parameters = parameters.checked(residual),
      .shape = shape,
  };
}

inline NormAddBackward norm_add_backward_params(const Array& dx, const Array& branch,
                                                const ResidualNormArrays& parameters, const Array& mean,
                                                const Array& rstd, const Array& dbranch,
                                                const ResidualNormGradientArrays& gradients, bool rms) {
  const ResidualNormShape shape = residual_norm_shape(dx, branch, dx, rms);
  require_sizes(branch, dx.sizes);
  require_like(dbranch, branch);
  require_statistics(mean, rstd, shape.rows, !rms);
  return {
      .dx = dx.data,
      .branch = branch.data,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .dbranch = dbranch.data,
      .parameters = parameters.checked(dx),
      .gradients = gradients.checked(shape.width),
      .shape = shape,
  };
}

}  // namespace evakernels
