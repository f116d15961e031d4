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

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Input x_in, OptionalInput weight_in,
                                                      OptionalInput bias_in, double eps, bool rms,
                                                      OutputDType out_dtype) {
  Call call;
  const Array x = call.read(x_in, "x"), weight = call.read_optional(weight_in, "weight"),
              bias = call.read_optional(bias_in, "bias");
  const RowSizes size(x);
  const Array y = call.output("y", x, out_dtype);
  const Array mean = call.statistic(!rms, "mean", x), rstd = call.statistic(true, "rstd", x);
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
  return call.results<3>();
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Input dy_in, Input x_in, OptionalInput weight_in,
                                                       Input mean_in, Input rstd_in, bool rms,
                                                       NeedsGrad needs_grad) {
  Call call;
  const Array dy = call.read(dy_in, "dy"), x = call.read(x_in, "x"),
              weight = call.read_optional(weight_in, "weight"), mean = call.read_if(!rms, mean_in, "mean"),
              rstd = call.read(rstd_in, "rstd");
  const RowSizes size(x);
  require_norm_serves(x, dy);
  require_statistics(mean, rstd, size.rows, !rms);
  const Array dx = call.output("dx", x.sizes, x.dtype);
  const Array dweight = call.gradient(needs_grad.at(0), "dweight", weight),
              dbias = call.gradient(needs_grad.at(1), "dbias", weight);
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
  return call.results<3>();
}

}  // namespace

EVAKERNELS_OPS(layer_norm, m) {
  EVAKERNELS_OP(m, layer_norm_forward);
  EVAKERNELS_OP(m, layer_norm_backward);
}

}  // namespace evakernels
