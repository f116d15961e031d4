// The norms joined with a residual connection, as torch operators.
#include "bind/launch.h"
#include "cpu/residual_norm.h"
#include "cuda/residual_norm.h"

namespace evakernels {
namespace {

// The factors and addends of an op, dense, and what the launchers need of them.
class Parameters {
 public:
  Parameters(const Tensor& residual, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& layer_scale, const std::optional<Tensor>& row_scale)
      : weight_(dense_vector(weight, residual.size(-1), "weight")),
        bias_(dense_vector(bias, residual.size(-1), "bias")),
        layer_scale_(dense_vector(layer_scale, residual.size(-1), "layer_scale")),
        row_scale_(dense_vector(row_scale, residual.size(0), "row_scale")) {}

  ResidualNormParameters view() const {
    return {view_of(weight_), view_of(bias_), view_of(layer_scale_), view_of(row_scale_)};
  }

 private:
  static std::optional<Tensor> dense_vector(const std::optional<Tensor>& vector, int64_t size,
                                            const char* name) {
    if (!vector) return std::nullopt;
    require(vector->dim() == 1 && vector->size(0) == size,
            std::string(name) + " must have " + std::to_string(size) + " elements");
    return torch::stable::contiguous(*vector);
  }

  static ParameterVector view_of(const std::optional<Tensor>& vector) {
    if (!vector) return {nullptr, DType::Float32};
    return {vector->const_data_ptr(), dtype_of(*vector, "a parameter")};
  }

  std::optional<Tensor> weight_, bias_, layer_scale_, row_scale_;
};

ResidualNormShape shape_of(const Tensor& residual, const Tensor& branch, bool rms) {
  require(residual.dim() > 1, "residual must be [B, ..., C]");
  const int64_t rows = product(leading_sizes(residual));
  const int64_t samples = residual.size(0);
  return {
      .rows = rows,
      .width = residual.size(-1),
      .rows_per_sample = samples == 0 ? 0 : rows / samples,
      .dtype = dtype_of(residual, "residual"),
      .branch_dtype = dtype_of(branch, "branch"),
      .rms = rms,
  };
}

// The mean (no element when rms) and the reciprocal standard deviation of each row.
std::pair<Tensor, Tensor> new_statistics(const Tensor& x, bool rms) {
  const std::vector<int64_t> leading = leading_sizes(x);
  return {new_float32(x, rms ? std::vector<int64_t>{0} : leading), new_float32(x, leading)};
}

void require_statistics(const Tensor& mean, const Tensor& rstd, const ResidualNormShape& shape) {
  require(mean.scalar_type() == ScalarType::Float && rstd.scalar_type() == ScalarType::Float,
          "mean and rstd must be float32");
  require(rstd.numel() == shape.rows && (shape.rms || mean.numel() == shape.rows),
          "mean and rstd must have one element for each of the " + std::to_string(shape.rows) + " rows");
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

const float* const_floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// A gradient of `parameter`, [width], or no elements where there is none to give.
Tensor new_gradient(const std::optional<Tensor>& parameter, const Tensor& otherwise, bool wanted,
                    int64_t width) {
  return torch::stable::new_empty(parameter ? *parameter : otherwise, {wanted ? width : 0});
}

ParameterGradient view_of_gradient(const Tensor& gradient, bool wanted) {
  return {wanted ? gradient.mutable_data_ptr() : nullptr, dtype_of(gradient, "a parameter")};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(
    const Tensor& residual_any, const Tensor& branch_any, std::optional<Tensor> weight,
    std::optional<Tensor> bias, std::optional<Tensor> layer_scale, std::optional<Tensor> row_scale,
    double eps, bool rms) {
  const ResidualNormShape shape = shape_of(residual_any, branch_any, rms);
  require_same_shape(branch_any, residual_any, "branch and residual");
  const Tensor residual = torch::stable::contiguous(residual_any);
  const Tensor branch = torch::stable::contiguous(branch_any);
  const Parameters parameters(residual, weight, bias, layer_scale, row_scale);
  const Tensor y = torch::stable::new_empty(residual, residual.sizes());
  const Tensor x = torch::stable::new_empty(residual, residual.sizes());
  const auto [mean, rstd] = new_statistics(residual, rms);
  const AddNormForward params = {
      .residual = residual.const_data_ptr(),
      .branch = branch.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .x = x.mutable_data_ptr(),
      .mean = floats(mean),
      .rstd = floats(rstd),
      .eps = static_cast<float>(eps),
      .parameters = parameters.view(),
      .shape = shape,
  };
  launch<cpu::add_norm_forward, cuda::add_norm_forward>("add_layer_norm_forward", residual, params);
  return {y, x, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_add_forward(
    const Tensor& residual_any, const Tensor& branch_any, std::optional<Tensor> weight,
    std::optional<Tensor> bias, std::optional<Tensor> layer_scale, std::optional<Tensor> row_scale,
    double eps, bool rms) {
  const ResidualNormShape shape = shape_of(residual_any, branch_any, rms);
  require_same_shape(branch_any, residual_any, "branch and residual");
  const Tensor residual = torch::stable::contiguous(residual_any);
  const Tensor branch = torch::stable::contiguous(branch_any);
  const Parameters parameters(residual, weight, bias, layer_scale, row_scale);
  const Tensor x = torch::stable::new_empty(residual, residual.sizes());
  const auto [mean, rstd] = new_statistics(residual, rms);
  const NormAddForward params = {
      .residual = residual.const_data_ptr(),
      .branch = branch.const_data_ptr(),
      .x = x.mutable_data_ptr(),
      .mean = floats(mean),
      .rstd = floats(rstd),
      .eps = static_cast<float>(eps),
      .parameters = parameters.view(),
      .shape = shape,
  };
  launch<cpu::norm_add_forward, cuda::norm_add_forward>("layer_norm_add_forward", residual, params);
  return {x, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& dy_any, const Tensor& dx_any, const Tensor& x_any, const Tensor& branch_any,
    std::optional<Tensor> weight, std::optional<Tensor> layer_scale, std::optional<Tensor> row_scale,
    const Tensor& mean_any, const Tensor& rstd_any, bool has_bias, bool rms) {
  const ResidualNormShape shape = shape_of(x_any, branch_any, rms);
  require_same_shape(dy_any, x_any, "dy and x");
  require_same_shape(dx_any, x_any, "dx and x");
  require(dtype_of(dy_any, "dy") == shape.dtype && dtype_of(dx_any, "dx") == shape.dtype,
          "dy and dx must be of x's dtype");
  // Without layer_scale only the branch's dtype counts.
  if (layer_scale) require_same_shape(branch_any, x_any, "branch and x");
  const Tensor dy = torch::stable::contiguous(dy_any), dx = torch::stable::contiguous(dx_any);
  const Tensor x = torch::stable::contiguous(x_any), branch = torch::stable::contiguous(branch_any);
  const Tensor mean = torch::stable::contiguous(mean_any), rstd = torch::stable::contiguous(rstd_any);
  require_statistics(mean, rstd, shape);
  const Parameters parameters(x, weight, std::nullopt, layer_scale, row_scale);

  const bool scaled = layer_scale || row_scale;
  const Tensor dresidual = torch::stable::new_empty(x, x.sizes());
  const Tensor dbranch = scaled ? torch::stable::new_empty(branch, x.sizes()) : new_float32(x, {0});
  const Tensor dweight = new_gradient(weight, x, weight.has_value(), shape.width);
  const Tensor dbias = new_gradient(weight, x, has_bias, shape.width);
  const Tensor dlayer_scale = new_gradient(layer_scale, rstd, layer_scale.has_value(), shape.width);
  const AddNormBackward params = {
      .dy = dy.const_data_ptr(),
      .dx = dx.const_data_ptr(),
      .x = x.const_data_ptr(),
      .branch = layer_scale ? branch.const_data_ptr() : nullptr,
      .mean = const_floats(mean),
      .rstd = const_floats(rstd),
      .dresidual = dresidual.mutable_data_ptr(),
      .dbranch = scaled ? dbranch.mutable_data_ptr() : nullptr,
      .parameters = parameters.view(),
      .gradients = {view_of_gradient(dweight, weight.has_value()), view_of_gradient(dbias, has_bias),
                    view_of_gradient(dlayer_scale, layer_scale.has_value())},
      .shape = shape,
  };
  launch<cpu::add_norm_backward, cuda::add_norm_backward, cuda::add_norm_backward_workspace>(
      "add_layer_norm_backward", x, params);
  return {dresidual, dbranch, dweight, dbias, dlayer_scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_add_backward(
    const Tensor& dx_any, const Tensor& branch_any, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> layer_scale, std::optional<Tensor> row_scale, const Tensor& mean_any,
    const Tensor& rstd_any, bool rms) {
  const ResidualNormShape shape = shape_of(dx_any, branch_any, rms);
  require_same_shape(branch_any, dx_any, "branch and dx");
  const Tensor dx = torch::stable::contiguous(dx_any), branch = torch::stable::contiguous(branch_any);
  const Tensor mean = torch::stable::contiguous(mean_any), rstd = torch::stable::contiguous(rstd_any);
  require_statistics(mean, rstd, shape);
  const Parameters parameters(dx, weight, bias, layer_scale, row_scale);

  const Tensor dbranch = torch::stable::new_empty(branch, branch.sizes());
  const Tensor dweight = new_gradient(weight, branch, weight.has_value(), shape.width);
  const Tensor dbias = new_gradient(weight, branch, bias.has_value(), shape.width);
  const Tensor dlayer_scale = new_gradient(layer_scale, rstd, layer_scale.has_value(), shape.width);
  const NormAddBackward params = {
      .dx = dx.const_data_ptr(),
      .branch = branch.const_data_ptr(),
      .mean = const_floats(mean),
      .rstd = const_floats(rstd),
      .dbranch = dbranch.mutable_data_ptr(),
      .parameters = parameters.view(),
      .gradients = {view_of_gradient(dweight, weight.has_value()), view_of_gradient(dbias, bias.has_value()),
                    view_of_gradient(dlayer_scale, layer_scale.has_value())},
      .shape = shape,
  };
  launch<cpu::norm_add_backward, cuda::norm_add_backward, cuda::norm_add_backward_workspace>(
      "layer_norm_add_backward", dx, params);
  return {dbranch, dweight, dbias, dlayer_scale};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("add_layer_norm_forward", TORCH_BOX(&evakernels::add_layer_norm_forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&evakernels::add_layer_norm_backward));
  m.impl("layer_norm_add_forward", TORCH_BOX(&evakernels::layer_norm_add_forward));
  m.impl("layer_norm_add_backward", TORCH_BOX(&evakernels::layer_norm_add_backward));
})
