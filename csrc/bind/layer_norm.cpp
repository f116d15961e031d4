// LayerNorm and RMSNorm over the last dimension.
#include "include/layer_norm.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

// y: the output or its gradient.
void require_norm_serves(const Array& x, const Array& y) {
  require_sizes(y, x.sizes);
  require(norm_serves(x.dtype, y.dtype), y.name, " must be ", name_of(x.dtype), " or float32, got ",
          name_of(y.dtype));
}

void layer_norm_forward(Call& call, Input x_in, OptionalInput weight_in, OptionalInput bias_in, Output y_out,
                        Output mean_out, Output rstd_out, double eps, bool rms, OutputDType out_dtype) {
  const Array x = call.read(x_in, "x"), weight = call.read_optional(weight_in, "weight"),
              bias = call.read_optional(bias_in, "bias");
  const RowSizes size(x);
  const Array y = call.output(y_out, "y", x, out_dtype);
  const Array mean = call.statistic(!rms, mean_out, "mean", x),
              rstd = call.statistic(true, rstd_out, "rstd", x);
  require_norm_serves(x, y);
  require_statistics(mean, rstd, size.rows, !rms);
  const LayerNormForward params = {
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
  call.launch<cpu::layer_norm_forward, cuda::layer_norm_forward>("layer_norm_forward", params);
}

void layer_norm_backward(Call& call, Input dy_in, Input x_in, OptionalInput weight_in, Input mean_in,
                         Input rstd_in, Output dx_out, Output dweight_out, Output dbias_out, bool rms,
                         NeedsGrad needs_grad) {
  const Array dy = call.read(dy_in, "dy"), x = call.read(x_in, "x"),
              weight = call.read_optional(weight_in, "weight"), mean = call.read_if(!rms, mean_in, "mean"),
              rstd = call.read(rstd_in, "rstd");
  const RowSizes size(x);
  require_norm_serves(x, dy);
  require_statistics(mean, rstd, size.rows, !rms);
  const Array dx = call.output(dx_out, "dx", x.sizes, x.dtype);
  const Array dweight = call.gradient(needs_grad.at(0), dweight_out, "dweight", weight),
              dbias = call.gradient(needs_grad.at(1), dbias_out, "dbias", weight);
  const LayerNormBackward params = {
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
  call.launch<cpu::layer_norm_backward, cuda::layer_norm_backward>("layer_norm_backward", params);
}

}  // namespace

EVAKERNELS_OPS(layer_norm, m) {
  EVAKERNELS_OP(m, layer_norm_forward, "x"_a, "weight"_a, "bias"_a, "y"_a, "mean"_a, "rstd"_a, py::kw_only(),
                "eps"_a = 1e-6, "rms"_a = false,
                R"(Writes y, mean and rstd of x [..., width].

y: of x's dtype, or one of x and y has 16 bits and the other is float32. weight, bias: [width] of x's or y's dtype or
float32, or None. mean, rstd: float32, one element a row; mean may be None if rms.)");
  EVAKERNELS_OP(m, layer_norm_backward, "dy"_a, "x"_a, "weight"_a, "mean"_a, "rstd"_a, "dx"_a, "dweight"_a,
                "dbias"_a, py::kw_only(), "rms"_a = false,
                R"(Writes dx, and dweight and dbias unless None.

Arrays as for layer_norm_forward; dweight and dbias: [width] of weight's dtype.)");
}

}  // namespace evakernels
