// swiglu as torch operators.
#include "bind/launch.h"
#include "bind/swiglu.h"
#include "cpu/swiglu.h"
#include "cuda/swiglu.h"

namespace evakernels {
namespace {

// The kernels know even rows; others are served by a dense copy.
Tensor with_even_rows(const Tensor& tensor) {
  return row_stride(sizes_of(tensor), strides_of(tensor)) ? tensor : as_contiguous(tensor);
}

std::tuple<Tensor, Tensor, Tensor> swiglu_forward(const Tensor& gate_any, const Tensor& up_any,
                                                  std::optional<Tensor> weight_any,
                                                  std::optional<Tensor> bias_any, double eps) {
  const std::vector<int64_t> leading = leading_sizes(gate_any);
  const Tensor gate = with_even_rows(gate_any), up = with_even_rows(up_any);
  const auto weight = contiguous_or_none(weight_any), bias = contiguous_or_none(bias_any);
  const Tensor out = new_tensor(gate, gate.sizes());
  const std::vector<int64_t> statistics = weight ? leading : std::vector<int64_t>{0};
  const Tensor mean = new_float32(gate, statistics), rstd = new_float32(gate, statistics);
  const SwigluForward params = swiglu_forward_params(
      array_of(gate, "gate"), array_of(up, "up"), array_of(weight, "norm_weight"),
      array_of(bias, "norm_bias"), array_of(out, "out"), array_if(weight.has_value(), mean, "mean"),
      array_if(weight.has_value(), rstd, "rstd"), eps);
  launch<cpu::swiglu_forward, cuda::swiglu_forward>("swiglu_forward", gate, params);
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_backward(const Tensor& dout_any, const Tensor& gate_any,
                                                           const Tensor& up_any,
                                                           std::optional<Tensor> weight_any,
                                                           const Tensor& mean_any, const Tensor& rstd_any,
                                                           Wanted wanted) {
  const Tensor dout = as_contiguous(dout_any);
  const Tensor gate = with_even_rows(gate_any), up = with_even_rows(up_any);
  const Tensor mean = as_contiguous(mean_any), rstd = as_contiguous(rstd_any);
  const auto weight = contiguous_or_none(weight_any);
  const bool normed = weight.has_value();
  const Tensor dgate = new_tensor(gate, gate.sizes());
  const Tensor dup = new_tensor(gate, gate.sizes());
  const Tensor dweight = new_gradient(weight, mean, wanted.at(0)),
               dbias = new_gradient(weight, mean, wanted.at(1));
  const SwigluBackward params = swiglu_backward_params(
      array_of(dout, "dout"), array_of(gate, "gate"), array_of(up, "up"), array_of(weight, "norm_weight"),
      array_if(normed, mean, "mean"), array_if(normed, rstd, "rstd"), array_of(dgate, "dgate"),
      array_of(dup, "dup"), array_unless_empty(dweight, "dweight"), array_unless_empty(dbias, "dbias"));
  launch<cpu::swiglu_backward, cuda::swiglu_backward>("swiglu_backward", gate, params);
  return {dgate, dup, dweight, dbias};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("swiglu_forward", TORCH_BOX(&evakernels::swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&evakernels::swiglu_backward));
})
