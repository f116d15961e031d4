// The params of layer_norm from arrays, dense ones.
#pragma once

#include "bind/array.h"
#include "common/layer_norm.h"

namespace evakernels {

// mean doesn't exist when rms.
inline LayerNormForward layer_norm_forward_params(const Array& x, const Array& weight, const Array& bias,
                                                  const Array& y, const Array& mean, const Array& rstd,
                                                  double eps, bool rms) {
  const RowSizes size(x);
  require_like(y, x);
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
      .weight_dtype = parameter_dtype(x, {&weight, &bias}),
      .rms = rms,
  };
}

// dweight and dbias don't exist where they aren't wanted.
inline LayerNormBackward layer_norm_backward_params(const Array& dy, const Array& x, const Array& weight,
                                                    const Array& mean, const Array& rstd, const Array& dx,
                                                    const Array& dweight, const Array& dbias, bool rms) {
  const RowSizes size(x);
  require_like(dy, x);
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
      .weight_dtype = parameter_dtype(x, {&weight, &dweight, &dbias}),
      .rms = rms,
  };
}

}  // namespace evakernels
