// The params of swiglu from arrays: dense ones but for gate and up, whose rows are.
#pragma once

#include "bind/array.h"
#include "common/swiglu.h"

namespace evakernels {

// How far apart the rows are, where they are dense and equally far apart, as halves of a packed projection
// are. The stride of an axis of one element says nothing.
inline std::optional<int64_t> row_stride(Sizes sizes, Sizes strides) {
  if (sizes.empty()) return std::nullopt;
  const int64_t width = sizes.back();
  if (product(sizes) == 0) return width;
  if (width > 1 && strides.back() != 1) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t rows = 1;
  for (size_t axis = sizes.size() - 1; axis-- > 0;) {
    if (sizes[axis] == 1) continue;
    if (!stride) stride = strides[axis];
    if (strides[axis] != rows * *stride) return std::nullopt;
    rows *= sizes[axis];
  }
  return stride.value_or(width);
}

inline SwigluRows even_rows(const Array& array) {
  const std::optional<int64_t> stride = row_stride(array.sizes, array.strides);
  require(stride.has_value(), std::string(array.name) + " must have dense rows that are equally far apart");
  return {array.data, *stride};
}

// mean and rstd: of the rows, if there is a norm.
inline void require_swiglu(const Array& gate, const Array& up, const Array& weight, const Array& mean,
                           const Array& rstd) {
  const RowSizes size(gate);
  require_like(up, gate);
  require(!weight || (mean && rstd), "mean and rstd are needed with norm_weight");
  require_statistics(mean, rstd, size.rows, false);
}

inline SwigluForward swiglu_forward_params(const Array& gate, const Array& up, const Array& weight,
                                           const Array& bias, const Array& out, const Array& mean,
                                           const Array& rstd, double eps) {
  require_swiglu(gate, up, weight, mean, rstd);
  require_like(out, gate);
  require(weight || !bias, "norm_bias needs norm_weight");
  const RowSizes size(gate);
  return {
      .gate = even_rows(gate),
      .up = even_rows(up),
      .norm_weight = weight.data,
      .norm_bias = bias.data,
      .out = out.data,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .rows = size.rows,
      .width = size.width,
      .eps = static_cast<float>(eps),
      .dtype = gate.dtype,
      .weight_dtype = parameter_dtype(gate, {&weight, &bias}),
  };
}

inline SwigluBackward swiglu_backward_params(const Array& dout, const Array& gate, const Array& up,
                                             const Array& weight, const Array& mean, const Array& rstd,
                                             const Array& dgate, const Array& dup, const Array& dweight,
                                             const Array& dbias) {
  require_swiglu(gate, up, weight, mean, rstd);
  for (const Array* array : {&dout, &dgate, &dup}) require_like(*array, gate);
  require(weight || (!dweight && !dbias), "dweight and dbias need norm_weight");
  const RowSizes size(gate);
  return {
      .dout = dout.data,
      .gate = even_rows(gate),
      .up = even_rows(up),
      .norm_weight = weight.data,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .dgate = dgate.data,
      .dup = dup.data,
      .dweight = dweight.data,
      .dbias = dbias.data,
      .rows = size.rows,
      .width = size.width,
      .dtype = gate.dtype,
      .weight_dtype = parameter_dtype(gate, {&weight, &dweight, &dbias}),
  };
}

}  // namespace evakernels
