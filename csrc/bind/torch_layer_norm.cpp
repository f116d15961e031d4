// layer_norm as torch operators.
#include "bind/launch.h"
#include "cpu/layer_norm.h"
#include "cuda/layer_norm.h"

namespace evakernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x_any, std::optional<Tensor> weight_any,
                                                      std::optional<Tensor> bias_any, double eps, bool rms) {
  const Tensor x = torch::stable::contiguous(x_any);
  const DType dtype = dtype_of(x, "x");
  const std::vector<int64_t> leading = leading_sizes(x);
  const int64_t width = x.size(-1);
  const auto weight = contiguous_vector(weight_any, width, dtype, "weight");
  const auto bias = contiguous_vector(bias_any, width, dtype, "bias");
  const DType weight_dtype = weight ? dtype_of(*weight, "weight") : bias ? dtype_of(*bias, "bias") : dtype;
  require(!bias || dtype_of(*bias, "bias") == weight_dtype, "bias must be of weight's dtype");

  const Tensor y = torch::stable::new_empty(x, x.sizes());
  const Tensor mean = new_float32(x, rms ? std::vector<int64_t>{0} : leading);
  const Tensor rstd = new_float32(x, leading);
  const LayerNormForward params = {
      .x = x.const_data_ptr(),
      .weight = data_or_null(weight),
      .bias = data_or_null(bias),
      .y = y.mutable_data_ptr(),
      .mean = static_cast<float*>(mean.mutable_data_ptr()),
      .rstd = static_cast<float*>(rstd.mutable_data_ptr()),
      .rows = product(leading),
      .width = width,
      .eps = static_cast<float>(eps),
      .dtype = dtype,
      .weight_dtype = weight_dtype,
      .rms = rms,
  };
  launch<cpu::layer_norm_forward, cuda::layer_norm_forward>("layer_norm_forward", x, params);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy_any, const Tensor& x_any,
                                                       std::optional<Tensor> weight_any,
                                                       const Tensor& mean_any, const Tensor& rstd_any,
                                                       bool has_bias, bool rms) {
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor dy = torch::stable::contiguous(dy_any);
  const Tensor mean = torch::stable::contiguous(mean_any);
  const Tensor rstd = torch::stable::contiguous(rstd_any);
  const DType dtype = dtype_of(x, "x");
  const int64_t rows = product(leading_sizes(x));
  const int64_t width = x.size(-1);
  const auto weight = contiguous_vector(weight_any, width, dtype, "weight");
  const DType weight_dtype = weight ? dtype_of(*weight, "weight") : dtype;
  require_same_shape(dy, x, "dy and x");
  require(dtype_of(dy, "dy") == dtype, "dy must be of x's dtype");
  require(mean.scalar_type() == ScalarType::Float && rstd.scalar_type() == ScalarType::Float,
          "mean and rstd must be float32");
  require(rstd.numel() == rows && (rms || mean.numel() == rows),
          "mean and rstd must have one element for each of the " + std::to_string(rows) + " rows");

  const auto parameter_gradient = [&](bool wanted) {
    return torch::stable::new_empty(weight ? *weight : x, {wanted ? width : 0});
  };
  const Tensor dx = torch::stable::new_empty(x, x.sizes());
  const Tensor dweight = parameter_gradient(weight.has_value());
  const Tensor dbias = parameter_gradient(has_bias);
  const LayerNormBackward params = {
      .dy = dy.const_data_ptr(),
      .x = x.const_data_ptr(),
      .weight = data_or_null(weight),
      .mean = static_cast<const float*>(mean.const_data_ptr()),
      .rstd = static_cast<const float*>(rstd.const_data_ptr()),
      .dx = dx.mutable_data_ptr(),
      .dweight = weight ? dweight.mutable_data_ptr() : nullptr,
      .dbias = has_bias ? dbias.mutable_data_ptr() : nullptr,
      .rows = rows,
      .width = width,
      .dtype = dtype,
      .weight_dtype = weight_dtype,
      .rms = rms,
  };
  launch<cpu::layer_norm_backward, cuda::layer_norm_backward, cuda::layer_norm_backward_workspace>(
      "layer_norm_backward", x, params);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("layer_norm_forward", TORCH_BOX(&evakernels::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&evakernels::layer_norm_backward));
})
