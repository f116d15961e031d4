// The params of gelu from arrays, dense ones.
#pragma once

#include "bind/array.h"
#include "common/gelu.h"

namespace evakernels {

inline GeluForward gelu_forward_params(const Array& x, const Array& bias, const Array& out, GeluForm form) {
  const RowSizes size(x);
  require_like(out, x);
  return {x.data, bias.data, out.data, size.rows, size.width, x.dtype, parameter_dtype(x, {&bias}), form};
}

// dbias doesn't exist where it isn't wanted.
inline GeluBackward gelu_backward_params(const Array& dout, const Array& x, const Array& bias,
                                         const Array& dx, const Array& dbias, GeluForm form) {
  const RowSizes size(x);
  require_like(dout, x);
  require_like(dx, x);
  require(!dbias || bias, "dbias without bias");
  if (dbias) require_like(dbias, bias);
  return {
      .dout = dout.data,
      .x = x.data,
      .bias = bias.data,
      .dx = dx.data,
      .dbias = dbias.data,
      .rows = size.rows,
      .width = size.width,
      .dtype = x.dtype,
      .bias_dtype = parameter_dtype(x, {&bias}),
      .form = form,
  };
}

}  // namespace evakernels
