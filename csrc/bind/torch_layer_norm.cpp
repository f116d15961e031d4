// layer_norm as torch operators.
#include "bind/launch.h"
#include "bind/layer_norm.h"
#include "cpu/layer_norm.h"
#include "cuda/layer_norm.h"

namespace evakernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x_any, std::optional<Tensor> weight_any,
                                                      std::optional<Tensor> bias_any, double eps, bool rms,
                                                      std::optional<ScalarType> out_dtype) {
  const Tensor x = as_contiguous(x_any);
  const auto weight = contiguous_or_none(weight_any), bias = contiguous_or_none(bias_any);
  const std::vector<int64_t> leading = leading_sizes(x);
  const Tensor y = new_tensor(x, x.sizes(), out_dtype);
  const Tensor mean = new_float32(x, rms ? std::vector<int64_t>{0} : leading);
  const Tensor rstd = new_float32(x, leading);
  const LayerNormForward params = layer_norm_forward_params(
      array_of(x, "x"), array_of(weight, "weight"), array_of(bias, "bias"), array_of(y, "y"),
      array_if(!rms, mean, "mean"), array_of(rstd, "rstd"), eps, rms);
  launch<cpu::layer_norm_forward, cuda::layer_norm_forward>("layer_norm_forward", x, params);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy_any, const Tensor& x_any,
                                                       std::optional<Tensor> weight_any,
                                                       const Tensor& mean_any, const Tensor& rstd_any,
                                                       bool rms, Wanted wanted) {
  const Tensor x = as_contiguous(x_any), dy = as_contiguous(dy_any);
  const Tensor mean = as_contiguous(mean_any), rstd = as_contiguous(rstd_any);
  const auto weight = contiguous_or_none(weight_any);
  const Tensor dx = new_tensor(x, x.sizes());
  const Tensor dweight = new_gradient(weight, rstd, wanted.at(0));
  const Tensor dbias = new_gradient(weight, rstd, wanted.at(1));
  const LayerNormBackward params = layer_norm_backward_params(
      array_of(dy, "dy"), array_of(x, "x"), array_of(weight, "weight"), array_if(!rms, mean, "mean"),
      array_of(rstd, "rstd"), array_of(dx, "dx"), array_unless_empty(dweight, "dweight"),
      array_unless_empty(dbias, "dbias"), rms);
  launch<cpu::layer_norm_backward, cuda::layer_norm_backward>("layer_norm_backward", x, params);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("layer_norm_forward", TORCH_BOX(&evakernels::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&evakernels::layer_norm_backward));
})
