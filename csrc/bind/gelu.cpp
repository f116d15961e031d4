// gelu(x + bias) and its gradients.
#include "include/gelu.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

[[maybe_unused]] GeluForm gelu_form(int64_t number) {
  require(number >= 0 && number < kGeluForms, "form is " + std::to_string(number) + "; accepted: 0, 1, 2");
  return static_cast<GeluForm>(number);
}

[[maybe_unused]] GeluForm gelu_form(const std::string& approximate) {
  if (approximate == "none") return GeluForm::Exact;
  if (approximate == "tanh") return GeluForm::Tanh;
  require(approximate == "sigmoid",
          "approximate is '" + approximate + "'; accepted: 'none', 'tanh', 'sigmoid'");
  return GeluForm::Sigmoid;
}

using FormArgument = Either<int64_t, const std::string&>;

void gelu_forward(Call& call, Input x_in, OptionalInput bias_in, Output out, FormArgument form) {
  const Array x = call.read(x_in, "x"), bias = call.read_optional(bias_in, "bias");
  const RowSizes size(x);
  const GeluForward params = {
      .x = x.data,
      .bias = bias.data,
      .out = call.output(out, "out", x.sizes, x.dtype).data,
      .rows = size.rows,
      .width = size.width,
      .dtype = x.dtype,
      .bias_dtype = parameter_dtype(x, {&bias}),
      .form = gelu_form(form),
  };
  call.launch<cpu::gelu_forward, cuda::gelu_forward>("gelu_forward", params);
}

void gelu_backward(Call& call, Input dout_in, Input x_in, OptionalInput bias_in, Output dx_out,
                   Output dbias_out, FormArgument form, NeedsGrad needs_grad) {
  const Array dout = call.read(dout_in, "dout"), x = call.read(x_in, "x"),
              bias = call.read_optional(bias_in, "bias");
  const RowSizes size(x);
  require_like(dout, x);
  const Array dx = call.output(dx_out, "dx", x.sizes, x.dtype);
  const Array dbias = call.gradient(needs_grad.at(0), dbias_out, "dbias", bias, x.dtype);
  require(!dbias || bias, "dbias without bias");
  if (dbias) require_like(dbias, bias);
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
}

}  // namespace

EVAKERNELS_OPS(gelu, m) {
  EVAKERNELS_OP(m, gelu_forward, "x"_a, "bias"_a, "out"_a, py::kw_only(), "approximate"_a = "none",
                "Writes out = gelu(x + bias). x: [..., F]; bias: [F] of x's dtype or float32, or None; "
                "approximate: none, tanh or sigmoid.");
  EVAKERNELS_OP(m, gelu_backward, "dout"_a, "x"_a, "bias"_a, "dx"_a, "dbias"_a, py::kw_only(),
                "approximate"_a = "none", "Writes dx, and dbias unless None. Arrays as for gelu_forward.");
}

}  // namespace evakernels
