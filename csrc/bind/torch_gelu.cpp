// gelu as torch operators.
#include "bind/launch.h"
#include "cpu/gelu.h"
#include "cuda/gelu.h"

namespace evakernels {
namespace {

Tensor gelu_forward(const Tensor& x_any, std::optional<Tensor> bias_any, bool tanh) {
  const DType dtype = dtype_of(x_any, "x");
  const int64_t rows = product(leading_sizes(x_any)), width = x_any.size(-1);
  const Tensor x = as_contiguous(x_any);
  const auto bias = contiguous_or_none(bias_any);
  const Array bias_array = array_of(bias, "bias");
  const Tensor out = new_tensor(x, x.sizes());
  const GeluForward params = {
      .x = x.const_data_ptr(),
      .bias = data_or_null(bias),
      .out = out.mutable_data_ptr(),
      .rows = rows,
      .width = width,
      .dtype = dtype,
      .bias_dtype = parameter_dtype(array_of(x, "x"), {&bias_array}),
      .tanh = tanh,
  };
  launch<cpu::gelu_forward, cuda::gelu_forward>("gelu_forward", x, params);
  return out;
}

std::tuple<Tensor, Tensor> gelu_backward(const Tensor& dout_any, const Tensor& x_any,
                                         std::optional<Tensor> bias_any, bool tanh) {
  require_same_shape(dout_any, x_any, "dout and x");
  const DType dtype = dtype_of(x_any, "x");
  require(dtype_of(dout_any, "dout") == dtype, "dout must be of x's dtype");
  const int64_t rows = product(leading_sizes(x_any)), width = x_any.size(-1);
  const Tensor dout = as_contiguous(dout_any), x = as_contiguous(x_any);
  const auto bias = contiguous_or_none(bias_any);
  const Array bias_array = array_of(bias, "bias");
  const Tensor dx = new_tensor(x, x.sizes());
  const Tensor dbias = new_tensor(bias ? *bias : x, {bias ? width : 0});
  const GeluBackward params = {
      .dout = dout.const_data_ptr(),
      .x = x.const_data_ptr(),
      .bias = data_or_null(bias),
      .dx = dx.mutable_data_ptr(),
      .dbias = bias ? dbias.mutable_data_ptr() : nullptr,
      .rows = rows,
      .width = width,
      .dtype = dtype,
      .bias_dtype = parameter_dtype(array_of(x, "x"), {&bias_array}),
      .tanh = tanh,
  };
  launch<cpu::gelu_backward, cuda::gelu_backward, cuda::gelu_backward_workspace>("gelu_backward", x, params);
  return {dx, dbias};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("gelu_forward", TORCH_BOX(&evakernels::gelu_forward));
  m.impl("gelu_backward", TORCH_BOX(&evakernels::gelu_backward));
})
