// The params of layer_norm from arrays, dense ones.
#pragma once

#include "bind/array.h"
#include "common/layer_norm.h"

namespace evakernels {

// `y` is what the norm writes, or its gradient.
inline void require_norm_serves(const Array& x, const Array& y) {
  require(norm_serves(x.dtype, y.dtype), std::string(y.name) + " is " + name_of(y.dtype) + " beside " +
                                             name_of(x.dtype) +
                                             "; the kernels take the same dtype, or 16 bits beside float32");
}

// mean doesn't exist when rms.
inline LayerNormForward layer_norm_forward_params(const Array& x, const Array& weight, const Array& bias,
                                                  const Array& y, const Array& mean, const Array& rstd,
                                                  double eps, bool rms) {
  const RowSizes size(x);
  require_sizes(y, x.sizes);
  require_norm_serves(x, y);
  require_statistics(mean, rstd, size.rows, !rms);
  return {
      .x = x.data,
      .weight = weight.data,
      .bias = bias.data,
      .y = y.data,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .rows = size.rows,
      .width = size.width,
      .eps = static_cast<float>(eps),
      .dtype = x.dtype,
      .y_dtype = y.dtype,
      .weight_dtype = parameter_dtype(x, {&weight, &bias}, &y),
      .rms = rms,
  };
}

// dweight and dbias don't exist where they aren't wanted.
inline LayerNormBackward layer_norm_backward_params(const Array& dy, const Array& x, const Array& weight,
                                                    const Array& mean, const Array& rstd, const Array& dx,
                                                    const Array& dweight, const Array& dbias, bool rms) {
  const RowSizes size(x);
  require_sizes(dy, x.sizes);
  require_norm_serves(x, dy);
  require_like(dx, x);
  require_statistics(mean, rstd, size.rows, !rms);
  return {
      .dy = dy.data,
      .x = x.data,
      .weight = weight.data,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .dx = dx.data,
      .dweight = dweight.data,
      .dbias = dbias.data,
      .rows = size.rows,
      .width = size.width,
      .dtype = x.dtype,
      .y_dtype = dy.dtype,
      .weight_dtype = parameter_dtype(x, {&weight, &dweight, &dbias}, &dy),
      .rms = rms,
  };
}

}  // namespace evakernels
