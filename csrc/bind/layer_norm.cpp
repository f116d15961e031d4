// LayerNorm and RMSNorm, alone and fused with the residual connection around them.
#include "include/layer_norm.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

struct NormArrays {
  Array weight, bias, layer_scale, row_scale;

  NormParameters parameters(const Array& x) const {
    const auto vector = [](const Array& array, int64_t size) -> ParameterVector {
      if (array) require_sizes(array, {size});
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

// dtype, branch_dtype: of the residual, without one of y, and of the forward pass's x.
NormShape norm_shape(const Call& call, const Array& x, const Array& row_scale, DType dtype,
                     DType branch_dtype, const Array& y, bool rms, bool add_first) {
  require(!row_scale || x.sizes.size() > 1, x.name, " must be [B, ..., C]");
  const RowSizes size(x);
  const NormShape shape = {
      .rows = size.rows,
      .width = size.width,
      .rows_per_sample = row_scale && x.sizes[0] > 0 ? size.rows / x.sizes[0] : 0,
      .dtype = dtype,
      .branch_dtype = branch_dtype,
      .y_dtype = y.dtype,
      .rms = rms,
      .add_first = add_first,
  };
  require_sizes(y, x.sizes);
  require(norm_serves(shape), y.name, " must be ", name_of(dtype),
          ", or the branch's dtype with a float32 residual, got ", name_of(y.dtype), " with a branch of ",
          name_of(branch_dtype));
  require(!call.is_on_gpu() || gpu_serves(shape), "branch must be ", name_of(dtype),
          " on a GPU, or one of branch and residual float32, in add + norm the residual, got ",
          name_of(branch_dtype));
  return shape;
}

// Sizes of mean and rstd in one tensor, with rms of rstd alone.
std::vector<int64_t> statistics_sizes(const Array& x, bool rms) {
  std::vector<int64_t> sizes(x.sizes.size(), rms ? 1 : 2);
  std::copy(x.sizes.begin(), x.sizes.end() - 1, sizes.begin() + 1);
  return sizes;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Input x_in, OptionalInput weight, OptionalInput bias,
                                                      double eps, bool rms, OutputDType out_dtype,
                                                      OptionalInput residual_in, OptionalInput layer_scale,
                                                      OptionalInput row_scale, bool add_first) {
  Call call;
  const Array x = call.read(x_in, "x"), residual = call.read_optional(residual_in, "residual");
  const NormArrays norm = read_norm(call, weight, bias, layer_scale, row_scale);
  require(residual || !(add_first || norm.layer_scale || norm.row_scale),
          "add_first, layer_scale and row_scale need a residual");
  const Array& stream = residual ? residual : x;
  require_sizes(stream, x.sizes);
  const Array y = call.output("y", stream, out_dtype);
  const NormShape shape =
      norm_shape(call, x, norm.row_scale, residual ? residual.dtype : y.dtype, x.dtype, y, rms, add_first);
  const Array total = call.output_if(add_first, "total", x.sizes, stream.dtype);
  float* const statistics = call.output("statistics", statistics_sizes(x, rms), DType::Float32).floats();
  const LayerNormForward params = {
      .residual = residual.data,
      .x = x.data,
      .y = y.data,
      .mean = statistics,
      .rstd = rms ? statistics : statistics + shape.rows,
      .eps = static_cast<float>(eps),
      .parameters = norm.parameters(x),
      .shape = shape,
      .total = total.data,
  };
  call.launch<cpu::layer_norm_forward, cuda::layer_norm_forward>("layer_norm_forward", params);
  return call.results<3>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_backward(
    Input dy_in, Input x_in, OptionalInput weight, Input statistics_in, NeedsGrad needs_grad,
    OptionalInput bias, OptionalInput layer_scale, OptionalInput row_scale, OptionalInput dtotal_in,
    OptionalInput branch_in) {
  Call call;
  const Array dy = call.read(dy_in, "dy"), x = call.read(x_in, "x"),
              statistics = call.read(statistics_in, "statistics"),
              dtotal = call.read_optional(dtotal_in, "dtotal"),
              branch = call.read_optional(branch_in, "branch");
  const NormArrays norm = read_norm(call, weight, bias, layer_scale, row_scale);
  const bool add_first = dtotal.exists, rms = statistics.sizes.size() > 0 && statistics.sizes[0] == 1;
  require(add_first == branch.exists, "dtotal and branch are needed together");
  const NormShape shape = norm_shape(call, x, norm.row_scale, add_first ? x.dtype : dy.dtype,
                                     add_first ? branch.dtype : x.dtype, dy, rms, add_first);
  if (add_first) require_like(dtotal, x);
  require_dtype(statistics, DType::Float32);
  require_sizes(statistics, statistics_sizes(x, rms));
  const Array dx = call.output("dx", x.sizes, x.dtype),
              dbranch = call.output_if(add_first && needs_grad.at(3), "dbranch", x.sizes, branch.dtype);
  const auto gradient = [&](size_t i, const char* name, const Array& parameter) {
    const Array array = call.gradient(needs_grad.at(i), name, parameter);
    if (array) require_sizes(array, {shape.width});
    return ParameterGradient{array.data, array.dtype};
  };
  const NormGradients gradients = {gradient(0, "dweight", norm.weight), gradient(1, "dbias", norm.weight),
                                   gradient(2, "dlayer_scale", norm.layer_scale)};
  const bool reads_branch = add_first && gradients.layer_scale.data;
  if (reads_branch) require_sizes(branch, x.sizes);
  float* const moments = statistics.floats();
  const LayerNormBackward params = {
      .dy = dy.data,
      .dtotal = dtotal.data,
      .x = x.data,
      .branch = reads_branch ? branch.data : nullptr,
      .mean = moments,
      .rstd = rms ? moments : moments + shape.rows,
      .dx = dx.data,
      .dbranch = dbranch.data,
      .parameters = norm.parameters(x),
      .gradients = gradients,
      .shape = shape,
  };
  call.launch<cpu::layer_norm_backward, cuda::layer_norm_backward>("layer_norm_backward", params);
  return call.results<5>();
}

}  // namespace

EVAKERNELS_OPS(layer_norm, m) {
  EVAKERNELS_OP(m, layer_norm_forward);
  EVAKERNELS_OP(m, layer_norm_backward);
}

}  // namespace evakernels
