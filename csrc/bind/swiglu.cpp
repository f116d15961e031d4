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

SwigluRows even_rows(const Array& array) {
  const std::optional<int64_t> stride = row_stride(array.sizes, array.strides);
  require(stride.has_value(), array.name, " must have dense rows that are equally far apart");
  return {array.data, *stride};
}

void require_norm(const Array& weight, const Array& mean, const Array& rstd, int64_t rows) {
  require(!weight || (mean && rstd), "mean and rstd are needed with norm_weight");
  require_statistics(mean, rstd, rows, false);
}

void require_padding(int64_t padding, int64_t width) {
  require(padding == 0 || (0 < padding && padding < width), "padding must be 0 or less than the channels");
}

void swiglu_forward(Call& call, Input gate_in, Input up_in, OptionalInput weight_in, OptionalInput bias_in,
                    Output out, Output mean_out, Output rstd_out, double eps, int64_t padding) {
  const Array gate = call.read_readable(gate_in, "gate", has_even_rows),
              up = call.read_readable(up_in, "up", has_even_rows),
              weight = call.read_optional(weight_in, "norm_weight"),
              bias = call.read_optional(bias_in, "norm_bias");
  const RowSizes size(gate);
  require_like(up, gate);
  require(weight || !bias, "norm_bias needs norm_weight");
  const Array hidden = call.output(out, "out", gate.sizes, gate.dtype);
  const Array mean = call.statistic(weight.exists, mean_out, "mean", gate),
              rstd = call.statistic(weight.exists, rstd_out, "rstd", gate);
  require_norm(weight, mean, rstd, size.rows);
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
}

void swiglu_backward(Call& call, Input dout_in, Input gate_in, Input up_in, OptionalInput weight_in,
                     Input mean_in, Input rstd_in, Output dgate_out, Output dup_out, Output dweight_out,
                     Output dbias_out, NeedsGrad needs_grad, int64_t padding) {
  const Array dout = call.read(dout_in, "dout"), gate = call.read_readable(gate_in, "gate", has_even_rows),
              up = call.read_readable(up_in, "up", has_even_rows),
              weight = call.read_optional(weight_in, "norm_weight"),
              mean = call.read_if(weight.exists, mean_in, "mean"),
              rstd = call.read_if(weight.exists, rstd_in, "rstd");
  const RowSizes size(gate);
  for (const Array* array : {&dout, &up}) require_like(*array, gate);
  require_norm(weight, mean, rstd, size.rows);
  require_padding(padding, size.width);
  const Array dgate = call.output(dgate_out, "dgate", gate.sizes, gate.dtype),
              dup = call.output(dup_out, "dup", gate.sizes, gate.dtype);
  const Array dweight = call.gradient(needs_grad.at(0), dweight_out, "dweight", weight),
              dbias = call.gradient(needs_grad.at(1), dbias_out, "dbias", weight);
  require(weight || (!dweight && !dbias), "dweight and dbias need norm_weight");
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
}

}  // namespace

EVAKERNELS_OPS(swiglu, m) {
  EVAKERNELS_OP(m, swiglu_forward, "gate"_a, "up"_a, "norm_weight"_a, "norm_bias"_a, "out"_a, "mean"_a,
                "rstd"_a, py::kw_only(), "eps"_a = 1e-6, "padding"_a = 0,
                R"(Writes out = silu(gate) * up, normalised if there is a norm_weight.

gate, up: [..., F], rows dense and equally far apart, as halves of a packed projection are. norm_weight,
norm_bias: [F] of gate's dtype or float32, or None. mean, rstd: float32, one element a row; None without a
norm. padding: number of trailing channels that are zero and that the statistics don't count.)");
  EVAKERNELS_OP(m, swiglu_backward, "dout"_a, "gate"_a, "up"_a, "norm_weight"_a, "mean"_a, "rstd"_a,
                "dgate"_a, "dup"_a, "dweight"_a, "dbias"_a, py::kw_only(), "padding"_a = 0,
                R"(Writes dgate and dup, and dweight and dbias unless None.

Arrays as for swiglu_forward; dgate and dup are dense, dweight and dbias of norm_weight's dtype.)");
}

}  // namespace evakernels
