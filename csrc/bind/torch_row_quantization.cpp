// row_quantization as torch operators.
#include "bind/torch_arguments.h"
#include "cpu/isa.h"
#include "cpu/row_quantization.h"

namespace evakernels {
namespace {

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x_any) {
  const Tensor x = as_contiguous(x_any);
  const Array rows = array_of(x, "x");
  const RowSizes size(rows);
  const Tensor codes = new_tensor(x, x.sizes(), ScalarType::Byte), scale = new_float32(x, leading_sizes(x));
  const QuantizeRows params = {
      .x = x.const_data_ptr(),
      .codes = static_cast<uint8_t*>(codes.mutable_data_ptr()),
      .scale = static_cast<float*>(scale.mutable_data_ptr()),
      .rows = size.rows,
      .width = size.width,
      .dtype = rows.dtype,
  };
  cpu::quantize_rows(params, cpu::active_isa(), torch_parallel);
  return {codes, scale};
}

Tensor dequantize_rows(const Tensor& y_any, const Tensor& scale_any, std::optional<Tensor> bias_any) {
  const Tensor y = as_contiguous(y_any), scale = as_contiguous(scale_any);
  const auto bias = contiguous_or_none(bias_any);
  const Array rows = array_of(y, "y"), columns = array_of(bias, "bias");
  const RowSizes size(rows);
  require(scale.scalar_type() == ScalarType::Float && scale.numel() == size.rows,
          "scale must be float32, one for each row");
  const Tensor out = new_tensor(y, y.sizes());
  const DequantizeRows params = {
      .y = y.const_data_ptr(),
      .scale = static_cast<const float*>(scale.const_data_ptr()),
      .bias = data_or_null(bias),
      .out = out.mutable_data_ptr(),
      .rows = size.rows,
      .width = size.width,
      .dtype = rows.dtype,
      .bias_dtype = parameter_dtype(rows, {&columns}),
  };
  cpu::dequantize_rows(params, cpu::active_isa(), torch_parallel);
  return out;
}

}  // namespace
}  // namespace evakernels

STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&evakernels::quantize_rows));
  m.impl("dequantize_rows", TORCH_BOX(&evakernels::dequantize_rows));
}
