// Rows in 8 bits, and back from a matmul of them. CPU only.
#include "include/row_quantization.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

std::tuple<Tensor, Tensor> quantize_rows(Input x_in) {
  Call call;
  const Array x = call.read(x_in, "x");
  const RowSizes size(x);
  const QuantizeRows params = {
      .x = x.data,
      .codes = call.output_bytes("codes", x.sizes),
      .scale = call.statistic(true, "scale", x).floats(),
      .rows = size.rows,
      .width = size.width,
      .dtype = x.dtype,
  };
  call.launch<cpu::quantize_rows, nullptr>("quantize_rows", params);
  return call.results<2>();
}

Tensor dequantize_rows(Input y_in, Input scale_in, OptionalInput bias_in) {
  Call call;
  const Array y = call.read(y_in, "y"), scale = call.read(scale_in, "scale"),
              bias = call.read_optional(bias_in, "bias");
  const RowSizes size(y);
  require(scale.dtype == DType::Float32 && product(scale.sizes) == size.rows,
          "scale must be float32, one for each row");
  const DequantizeRows params = {
      .y = y.data,
      .scale = scale.floats(),
      .bias = bias.data,
      .out = call.output("out", y.sizes, y.dtype).data,
      .rows = size.rows,
      .width = size.width,
      .dtype = y.dtype,
      .bias_dtype = parameter_dtype(y, {&bias}),
  };
  call.launch<cpu::dequantize_rows, nullptr>("dequantize_rows", params);
  return call.results<1>();
}

}  // namespace

EVAKERNELS_CPU_OPS(row_quantization, m) {
  EVAKERNELS_OP(m, quantize_rows);
  EVAKERNELS_OP(m, dequantize_rows);
}

}  // namespace evakernels
