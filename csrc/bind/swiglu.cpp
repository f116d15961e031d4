// The gated product of a SwiGLU MLP and the LayerNorm after it.
#include "include/swiglu.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

// The row stride if rows are dense and evenly spaced, as halves of a packed projection are. Strides of
// dimensions of size 1 have no meaning.
std::optional<int64_t> row_stride(Sizes sizes, Sizes strides) {
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

bool has_even_rows(Sizes sizes, Sizes strides) { return row_stride(sizes, strides).has_value(); }

SwigluRows even_rows(const Array& array) { return {array.data, *row_stride(array.sizes, array.strides)}; }

void require_padding(int64_t padding, int64_t width) {
  require(padding == 0 || (0 < padding && padding < width), "padding must be 0 or less than the channels");
}

std::tuple<Tensor, Tensor, Tensor> swiglu_forward(Input gate_in, Input up_in, OptionalInput weight_in,
                                                  OptionalInput bias_in, double eps, int64_t padding) {
  Call call;
  const Array gate = call.read_readable(gate_in, "gate", has_even_rows),
              up = call.read_readable(up_in, "up", has_even_rows),
              weight = call.read_optional(weight_in, "norm_weight"),
              bias = call.read_optional(bias_in, "norm_bias");
  const RowSizes size(gate);
  require_like(up, gate);
  require(weight || !bias, "norm_bias needs norm_weight");
  const Array hidden = call.output("out", gate.sizes, gate.dtype);
  const Array mean = call.statistic(weight.exists, "mean", gate),
              rstd = call.statistic(weight.exists, "rstd", gate);
  require_padding(padding, size.width);
  const SwigluForward params = {
      .gate = even_rows(gate),
      .up = even_rows(up),
      .norm_weight = weight.data,
      .norm_bias = bias.data,
      .out = hidden.data,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .rows = size.rows,
      .width = size.width,
      .padding = padding,
      .eps = static_cast<float>(eps),
      .dtype = gate.dtype,
      .weight_dtype = parameter_dtype(gate, {&weight, &bias}),
  };
  call.launch<cpu::swiglu_forward, cuda::swiglu_forward>("swiglu_forward", params);
  return call.results<3>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_backward(Input dout_in, Input gate_in, Input up_in,
                                                           OptionalInput weight_in, Input mean_in,
                                                           Input rstd_in, NeedsGrad needs_grad,
                                                           int64_t padding) {
  Call call;
  const Array dout = call.read(dout_in, "dout"), gate = call.read_readable(gate_in, "gate", has_even_rows),
              up = call.read_readable(up_in, "up", has_even_rows),
              weight = call.read_optional(weight_in, "norm_weight"),
              mean = call.read_if(weight.exists, mean_in, "mean"),
              rstd = call.read_if(weight.exists, rstd_in, "rstd");
  const RowSizes size(gate);
  for (const Array* array : {&dout, &up}) require_like(*array, gate);
  require_statistics(mean, rstd, size.rows, false);
  require_padding(padding, size.width);
  const Array dgate = call.output("dgate", gate.sizes, gate.dtype),
              dup = call.output("dup", gate.sizes, gate.dtype);
  const Array dweight = call.gradient(needs_grad.at(0), "dweight", weight),
              dbias = call.gradient(needs_grad.at(1), "dbias", weight);
  const SwigluBackward params = {
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
      .padding = padding,
      .dtype = gate.dtype,
      .weight_dtype = parameter_dtype(gate, {&weight, &dweight, &dbias}),
  };
  call.launch<cpu::swiglu_backward, cuda::swiglu_backward>("swiglu_backward", params);
  return call.results<4>();
}

}  // namespace

EVAKERNELS_OPS(swiglu, m) {
  EVAKERNELS_OP(m, swiglu_forward);
  EVAKERNELS_OP(m, swiglu_backward);
}

}  // namespace evakernels
