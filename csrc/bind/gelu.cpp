// gelu(x + bias) and its gradients.
#include "include/gelu.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

GeluForm gelu_form(int64_t number) {
  require(number >= 0 && number < kGeluForms, "form is " + std::to_string(number) + "; accepted: 0, 1, 2");
  return static_cast<GeluForm>(number);
}

Tensor gelu_forward(Input x_in, OptionalInput bias_in, int64_t form) {
  Call call;
  const Array x = call.read(x_in, "x"), bias = call.read_optional(bias_in, "bias");
  const RowSizes size(x);
  const GeluForward params = {
      .x = x.data,
      .bias = bias.data,
      .out = call.output("out", x.sizes, x.dtype).data,
      .rows = size.rows,
      .width = size.width,
      .dtype = x.dtype,
      .bias_dtype = parameter_dtype(x, {&bias}),
      .form = gelu_form(form),
  };
  call.launch<cpu::gelu_forward, cuda::gelu_forward>("gelu_forward", params);
  return call.results<1>();
}

std::tuple<Tensor, Tensor> gelu_backward(Input dout_in, Input x_in, OptionalInput bias_in, int64_t form,
                                         NeedsGrad needs_grad) {
  Call call;
  const Array dout = call.read(dout_in, "dout"), x = call.read(x_in, "x"),
              bias = call.read_optional(bias_in, "bias");
  const RowSizes size(x);
  require_like(dout, x);
  const Array dx = call.output("dx", x.sizes, x.dtype);
  const Array dbias = call.gradient(needs_grad.at(0), "dbias", bias);
  const GeluBackward params = {
      .dout = dout.data,
      .x = x.data,
      .bias = bias.data,
      .dx = dx.data,
      .dbias = dbias.data,
      .rows = size.rows,
      .width = size.width,
      .dtype = x.dtype,
      .bias_dtype = parameter_dtype(x, {&bias}),
      .form = gelu_form(form),
  };
  call.launch<cpu::gelu_backward, cuda::gelu_backward>("gelu_backward", params);
  return call.results<2>();
}

}  // namespace

EVAKERNELS_OPS(gelu, m) {
  EVAKERNELS_OP(m, gelu_forward);
  EVAKERNELS_OP(m, gelu_backward);
}

}  // namespace evakernels
