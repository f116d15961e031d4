// LayerNorm and RMSNorm fused with the residual connection around them.
#include "include/residual_norm.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

struct NormArrays {
  Array weight, bias, layer_scale, row_scale;

  ResidualNormParameters parameters(const Array& x) const {
    const auto vector = [](const Array& array, int64_t size) -> ParameterVector {
      require(!array || (array.sizes.size() == 1 && array.sizes[0] == size), array.name, " must have ",
              std::to_string(size), " elements");
      return {array.data, array.dtype};
    };
    const int64_t width = x.sizes.back();
    return {vector(weight, width), vector(bias, width), vector(layer_scale, width),
            vector(row_scale, x.sizes[0])};
  }
};

NormArrays read_norm(Call& call, OptionalInput weight, OptionalInput bias, OptionalInput layer_scale,
                     OptionalInput row_scale) {
  return {call.read_optional(weight, "weight"), call.read_optional(bias, "bias"),
          call.read_optional(layer_scale, "layer_scale"), call.read_optional(row_scale, "row_scale")};
}

// first: index of the weight in needs_grad.
ResidualNormGradients norm_gradients(Call& call, const NormArrays& norm, int64_t width, NeedsGrad needs_grad,
                                     size_t first = 0) {
  const auto gradient = [&](size_t i, const char* name, const Array& parameter) {
    const Array array = call.gradient(needs_grad.at(first + i), name, parameter);
    if (array) require_sizes(array, {width});
    return ParameterGradient{array.data, array.dtype};
  };
  return {gradient(0, "dweight", norm.weight), gradient(1, "dbias", norm.weight),
          gradient(2, "dlayer_scale", norm.layer_scale)};
}

// y: in add + norm the norm's output or its gradient, in norm + add the sum.
ResidualNormShape norm_shape(const Array& x, const Array& branch, const Array& y, bool rms) {
  require(x.sizes.size() > 1, x.name, " must be [B, ..., C]");
  const RowSizes size(x);
  const int64_t samples = x.sizes[0];
  return {
      .rows = size.rows,
      .width = size.width,
      .rows_per_sample = samples == 0 ? 0 : size.rows / samples,
      .dtype = x.dtype,
      .branch_dtype = branch.dtype,
      .y_dtype = y.dtype,
      .rms = rms,
  };
}

ResidualNormShape add_norm_shape(const Array& x, const Array& branch, const Array& y, bool rms) {
  const ResidualNormShape shape = norm_shape(x, branch, y, rms);
  require_sizes(y, x.sizes);
  require(add_norm_serves(shape), y.name, " must be ", name_of(x.dtype),
          ", or the branch's dtype with a float32 residual, got ", name_of(y.dtype), " with a branch of ",
          name_of(branch.dtype));
  return shape;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(Input residual_in, Input branch_in,
                                                                  OptionalInput weight, OptionalInput bias,
                                                                  OptionalInput layer_scale,
                                                                  OptionalInput row_scale, double eps,
                                                                  bool rms, OutputDType out_dtype) {
  Call call;
  const Array residual = call.read(residual_in, "residual"), branch = call.read(branch_in, "branch");
  const NormArrays norm = read_norm(call, weight, bias, layer_scale, row_scale);
  const Array y = call.output("y", residual, out_dtype);
  const ResidualNormShape shape = add_norm_shape(residual, branch, y, rms);
  const Array x = call.output("x", residual.sizes, residual.dtype),
              mean = call.statistic(!rms, "mean", residual), rstd = call.statistic(true, "rstd", residual);
  require_sizes(branch, residual.sizes);
  require_statistics(mean, rstd, shape.rows, !rms);
  const AddNormForward params = {
      .residual = residual.data,
      .branch = branch.data,
      .y = y.data,
      .x = x.data,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .eps = static_cast<float>(eps),
      .parameters = norm.parameters(residual),
      .shape = shape,
  };
  call.launch<cpu::add_norm_forward, cuda::add_norm_forward>("add_layer_norm_forward", params);
  return call.results<4>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    Input dy_in, Input dx_in, Input x_in, Input branch_in, OptionalInput weight, OptionalInput layer_scale,
    OptionalInput row_scale, Input mean_in, Input rstd_in, bool rms, NeedsGrad needs_grad) {
  Call call;
  const Array dy = call.read(dy_in, "dy"), dx = call.read(dx_in, "dx"), x = call.read(x_in, "x"),
              branch = call.read(branch_in, "branch"), mean = call.read_if(!rms, mean_in, "mean"),
              rstd = call.read(rstd_in, "rstd");
  const NormArrays norm = {call.read_optional(weight, "weight"), no_array("bias"),
                           call.read_optional(layer_scale, "layer_scale"),
                           call.read_optional(row_scale, "row_scale")};
  const ResidualNormShape shape = add_norm_shape(x, branch, dy, rms);
  require_like(dx, x);
  require_statistics(mean, rstd, shape.rows, !rms);
  const Array dresidual = call.output("dresidual", x.sizes, x.dtype),
              dbranch = call.output_if(needs_grad.at(0), "dbranch", x.sizes, branch.dtype, DType::Float32);
  const ResidualNormGradients gradients = norm_gradients(call, norm, shape.width, needs_grad, 1);
  if (gradients.layer_scale.data) require_sizes(branch, x.sizes);
  const AddNormBackward params = {
      .dy = dy.data,
      .dx = dx.data,
      .x = x.data,
      .branch = gradients.layer_scale.data ? branch.data : nullptr,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .dresidual = dresidual.data,
      .dbranch = dbranch.data,
      .parameters = norm.parameters(x),
      .gradients = gradients,
      .shape = shape,
  };
  call.launch<cpu::add_norm_backward, cuda::add_norm_backward>("add_layer_norm_backward", params);
  return call.results<5>();
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_add_forward(Input residual_in, Input branch_in,
                                                          OptionalInput weight, OptionalInput bias,
                                                          OptionalInput layer_scale, OptionalInput row_scale,
                                                          double eps, bool rms) {
  Call call;
  const Array residual = call.read(residual_in, "residual"), branch = call.read(branch_in, "branch");
  const NormArrays norm = read_norm(call, weight, bias, layer_scale, row_scale);
  const ResidualNormShape shape = norm_shape(residual, branch, residual, rms);
  const Array x = call.output("x", residual.sizes, residual.dtype),
              mean = call.statistic(!rms, "mean", residual), rstd = call.statistic(true, "rstd", residual);
  require_sizes(branch, residual.sizes);
  require_statistics(mean, rstd, shape.rows, !rms);
  const NormAddForward params = {
      .residual = residual.data,
      .branch = branch.data,
      .x = x.data,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .eps = static_cast<float>(eps),
      .parameters = norm.parameters(residual),
      .shape = shape,
  };
  call.launch<cpu::norm_add_forward, cuda::norm_add_forward>("layer_norm_add_forward", params);
  return call.results<3>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_add_backward(
    Input dx_in, Input branch_in, OptionalInput weight, OptionalInput bias, OptionalInput layer_scale,
    OptionalInput row_scale, Input mean_in, Input rstd_in, bool rms, NeedsGrad needs_grad) {
  Call call;
  const Array dx = call.read(dx_in, "dx"), branch = call.read(branch_in, "branch"),
              mean = call.read_if(!rms, mean_in, "mean"), rstd = call.read(rstd_in, "rstd");
  const NormArrays norm = read_norm(call, weight, bias, layer_scale, row_scale);
  const ResidualNormShape shape = norm_shape(dx, branch, dx, rms);
  require_sizes(branch, dx.sizes);
  require_statistics(mean, rstd, shape.rows, !rms);
  const NormAddBackward params = {
      .dx = dx.data,
      .branch = branch.data,
      .mean = mean.floats(),
      .rstd = rstd.floats(),
      .dbranch = call.output("dbranch", branch.sizes, branch.dtype).data,
      .parameters = norm.parameters(dx),
      .gradients = norm_gradients(call, norm, shape.width, needs_grad),
      .shape = shape,
  };
  call.launch<cpu::norm_add_backward, cuda::norm_add_backward>("layer_norm_add_backward", params);
  return call.results<4>();
}

}  // namespace

EVAKERNELS_OPS(residual_norm, m) {
  EVAKERNELS_OP(m, add_layer_norm_forward);
  EVAKERNELS_OP(m, add_layer_norm_backward);
  EVAKERNELS_OP(m, layer_norm_add_forward);
  EVAKERNELS_OP(m, layer_norm_add_backward);
}

}  // namespace evakernels
