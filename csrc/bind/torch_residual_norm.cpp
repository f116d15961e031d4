// The norms joined with a residual connection, as torch operators.
#include "bind/launch.h"
#include "bind/residual_norm.h"
#include "cpu/residual_norm.h"
#include "cuda/residual_norm.h"

namespace evakernels {
namespace {

// The factors and addends of an op, dense.
class Parameters {
 public:
  Parameters(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& layer_scale, const std::optional<Tensor>& row_scale)
      : weight_(contiguous_or_none(weight)),
        bias_(contiguous_or_none(bias)),
        layer_scale_(contiguous_or_none(layer_scale)),
        row_scale_(contiguous_or_none(row_scale)) {}

  ResidualNormArrays arrays() const {
    return {array_of(weight_, "weight"), array_of(bias_, "bias"), array_of(layer_scale_, "layer_scale"),
            array_of(row_scale_, "row_scale")};
  }

 private:
  std::optional<Tensor> weight_, bias_, layer_scale_, row_scale_;
};

// The mean (no element when rms) and the reciprocal standard deviation of each row.
std::pair<Tensor, Tensor> new_statistics(const Tensor& x, bool rms) {
  const std::vector<int64_t> leading = leading_sizes(x);
  return {new_float32(x, rms ? std::vector<int64_t>{0} : leading), new_float32(x, leading)};
}

// The gradients of weight, bias and layer_scale, which the last three of `wanted` are about. That of the bias
// has the dtype of the weight.
struct Gradients {
  Tensor weight, bias, layer_scale;

  Gradients(const std::optional<Tensor>& of_weight, const std::optional<Tensor>& of_layer_scale,
            const Tensor& rstd, const Wanted& wanted)
      : weight(new_gradient(of_weight, rstd, wanted.at(wanted.size() - 3))),
        bias(new_gradient(of_weight, rstd, wanted.at(wanted.size() - 2))),
        layer_scale(new_gradient(of_layer_scale, rstd, wanted.at(wanted.size() - 1))) {}

  ResidualNormGradientArrays arrays() const {
    return {array_unless_empty(weight, "dweight"), array_unless_empty(bias, "dbias"),
            array_unless_empty(layer_scale, "dlayer_scale")};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(
    const Tensor& residual_any, const Tensor& branch_any, std::optional<Tensor> weight,
    std::optional<Tensor> bias, std::optional<Tensor> layer_scale, std::optional<Tensor> row_scale,
    double eps, bool rms, std::optional<ScalarType> out_dtype) {
  const Tensor residual = as_contiguous(residual_any);
  const Tensor branch = as_contiguous(branch_any);
  const Parameters parameters(weight, bias, layer_scale, row_scale);
  const Tensor y = new_tensor(residual, residual.sizes(), out_dtype);
  const Tensor x = new_tensor(residual, residual.sizes());
  const auto [mean, rstd] = new_statistics(residual, rms);
  const AddNormForward params = add_norm_forward_params(
      array_of(residual, "residual"), array_of(branch, "branch"), parameters.arrays(), array_of(y, "y"),
      array_of(x, "x"), array_if(!rms, mean, "mean"), array_of(rstd, "rstd"), eps, rms);
  launch<cpu::add_norm_forward, cuda::add_norm_forward>("add_layer_norm_forward", residual, params);
  return {y, x, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_add_forward(
    const Tensor& residual_any, const Tensor& branch_any, std::optional<Tensor> weight,
    std::optional<Tensor> bias, std::optional<Tensor> layer_scale, std::optional<Tensor> row_scale,
    double eps, bool rms) {
  const Tensor residual = as_contiguous(residual_any);
  const Tensor branch = as_contiguous(branch_any);
  const Parameters parameters(weight, bias, layer_scale, row_scale);
  const Tensor x = new_tensor(residual, residual.sizes());
  const auto [mean, rstd] = new_statistics(residual, rms);
  const NormAddForward params = norm_add_forward_params(
      array_of(residual, "residual"), array_of(branch, "branch"), parameters.arrays(), array_of(x, "x"),
      array_if(!rms, mean, "mean"), array_of(rstd, "rstd"), eps, rms);
  launch<cpu::norm_add_forward, cuda::norm_add_forward>("layer_norm_add_forward", residual, params);
  return {x, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& dy_any, const Tensor& dx_any, const Tensor& x_any, const Tensor& branch_any,
    std::optional<Tensor> weight, std::optional<Tensor> layer_scale, std::optional<Tensor> row_scale,
    const Tensor& mean_any, const Tensor& rstd_any, bool rms, Wanted wanted) {
  const Tensor dy = as_contiguous(dy_any), dx = as_contiguous(dx_any);
  const Tensor x = as_contiguous(x_any), branch = as_contiguous(branch_any);
  const Tensor mean = as_contiguous(mean_any), rstd = as_contiguous(rstd_any);
  const Parameters parameters(weight, std::nullopt, layer_scale, row_scale);

  const Tensor dresidual = new_tensor(x, x.sizes());
  const Tensor dbranch = wanted.at(0) ? new_tensor(branch, x.sizes()) : new_float32(x, {0});
  const Gradients gradients(weight, layer_scale, rstd, wanted);
  const AddNormBackward params = add_norm_backward_params(
      array_of(dy, "dy"), array_of(dx, "dx"), array_of(x, "x"), array_of(branch, "branch"),
      parameters.arrays(), array_if(!rms, mean, "mean"), array_of(rstd, "rstd"),
      array_of(dresidual, "dresidual"), array_unless_empty(dbranch, "dbranch"), gradients.arrays(), rms);
  launch<cpu::add_norm_backward, cuda::add_norm_backward>("add_layer_norm_backward", x, params);
  return {dresidual, dbranch, gradients.weight, gradients.bias, gradients.layer_scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_add_backward(
    const Tensor& dx_any, const Tensor& branch_any, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> layer_scale, std::optional<Tensor> row_scale, const Tensor& mean_any,
    const Tensor& rstd_any, bool rms, Wanted wanted) {
  const Tensor dx = as_contiguous(dx_any), branch = as_contiguous(branch_any);
  const Tensor mean = as_contiguous(mean_any), rstd = as_contiguous(rstd_any);
  const Parameters parameters(weight, bias, layer_scale, row_scale);

  const Tensor dbranch = new_tensor(branch, branch.sizes());
  const Gradients gradients(weight, layer_scale, rstd, wanted);
  const NormAddBackward params = norm_add_backward_params(
      array_of(dx, "dx"), array_of(branch, "branch"), parameters.arrays(), array_if(!rms, mean, "mean"),
      array_of(rstd, "rstd"), array_of(dbranch, "dbranch"), gradients.arrays(), rms);
  launch<cpu::norm_add_backward, cuda::norm_add_backward>("layer_norm_add_backward", dx, params);
  return {dbranch, gradients.weight, gradients.bias, gradients.layer_scale};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("add_layer_norm_forward", TORCH_BOX(&evakernels::add_layer_norm_forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&evakernels::add_layer_norm_backward));
  m.impl("layer_norm_add_forward", TORCH_BOX(&evakernels::layer_norm_add_forward));
  m.impl("layer_norm_add_backward", TORCH_BOX(&evakernels::layer_norm_add_backward));
})
