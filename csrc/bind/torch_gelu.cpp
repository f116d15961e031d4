// gelu as torch operators.
#include "bind/gelu.h"
#include "bind/launch.h"
#include "cpu/gelu.h"
#include "cuda/gelu.h"

namespace evakernels {
namespace {

GeluForm gelu_form(int64_t number) {
  require(number >= 0 && number < kGeluForms, "form is " + std::to_string(number) + "; accepted: 0, 1, 2");
  return static_cast<GeluForm>(number);
}

Tensor gelu_forward(const Tensor& x_any, std::optional<Tensor> bias_any, int64_t form) {
  const Tensor x = as_contiguous(x_any);
  const auto bias = contiguous_or_none(bias_any);
  const Tensor out = new_tensor(x, x.sizes());
  const GeluForward params =
      gelu_forward_params(array_of(x, "x"), array_of(bias, "bias"), array_of(out, "out"), gelu_form(form));
  launch<cpu::gelu_forward, cuda::gelu_forward>("gelu_forward", x, params);
  return out;
}

std::tuple<Tensor, Tensor> gelu_backward(const Tensor& dout_any, const Tensor& x_any,
                                         std::optional<Tensor> bias_any, int64_t form, Wanted wanted) {
  const Tensor dout = as_contiguous(dout_any), x = as_contiguous(x_any);
  const auto bias = contiguous_or_none(bias_any);
  const Tensor dx = new_tensor(x, x.sizes());
  const Tensor dbias = new_gradient(bias, x, wanted.at(0));
  const GeluBackward params =
      gelu_backward_params(array_of(dout, "dout"), array_of(x, "x"), array_of(bias, "bias"),
                           array_of(dx, "dx"), array_unless_empty(dbias, "dbias"), gelu_form(form));
  launch<cpu::gelu_backward, cuda::gelu_backward>("gelu_backward", x, params);
  return {dx, dbias};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("gelu_forward", TORCH_BOX(&evakernels::gelu_forward));
  m.impl("gelu_backward", TORCH_BOX(&evakernels::gelu_backward));
})
