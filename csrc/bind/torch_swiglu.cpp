// swiglu as torch operators.
#include "bind/launch.h"
#include "cpu/swiglu.h"
#include "cuda/swiglu.h"

namespace evakernels {
namespace {

// A matrix whose rows are dense and equally far apart, as halves of a packed projection are; else a dense
// copy.
class RowsOf {
 public:
  RowsOf(const Tensor& tensor)
      : tensor_(has_even_rows(tensor) ? tensor : torch::stable::contiguous(tensor)) {}

  SwigluRows rows() const {
    const bool one_row = tensor_.dim() < 2;
    return {tensor_.const_data_ptr(), one_row ? tensor_.numel() : tensor_.stride(tensor_.dim() - 2)};
  }

 private:
  static bool has_even_rows(const Tensor& tensor) {
    if (tensor.dim() == 0 || tensor.stride(-1) != 1) return false;
    for (int64_t axis = 0; axis + 2 < tensor.dim(); ++axis) {
      if (tensor.stride(axis) != tensor.size(axis + 1) * tensor.stride(axis + 1)) return false;
    }
    return true;
  }

  Tensor tensor_;
};

void require_pair(const Tensor& gate, const Tensor& up) {
  require_same_shape(gate, up, "gate and up");
  require(dtype_of(gate, "gate") == dtype_of(up, "up"), "up must be of gate's dtype");
}

std::tuple<Tensor, Tensor, Tensor> swiglu_forward(const Tensor& gate, const Tensor& up,
                                                  std::optional<Tensor> weight_any,
                                                  std::optional<Tensor> bias_any, double eps) {
  require_pair(gate, up);
  const DType dtype = dtype_of(gate, "gate");
  const std::vector<int64_t> leading = leading_sizes(gate);
  const int64_t width = gate.size(-1);
  const auto weight = contiguous_vector(weight_any, width, dtype, "norm_weight");
  const auto bias = contiguous_vector(bias_any, width, dtype, "norm_bias");
  require(weight || !bias, "norm_bias needs norm_weight");
  const DType weight_dtype = weight ? dtype_of(*weight, "norm_weight") : dtype;
  require(!bias || dtype_of(*bias, "norm_bias") == weight_dtype, "norm_bias must be of norm_weight's dtype");

  const RowsOf gate_rows(gate), up_rows(up);
  const Tensor out = torch::stable::new_empty(gate, gate.sizes());
  const std::vector<int64_t> statistics = weight ? leading : std::vector<int64_t>{0};
  const Tensor mean = new_float32(gate, statistics);
  const Tensor rstd = new_float32(gate, statistics);
  const SwigluForward params = {
      .gate = gate_rows.rows(),
      .up = up_rows.rows(),
      .norm_weight = data_or_null(weight),
      .norm_bias = data_or_null(bias),
      .out = out.mutable_data_ptr(),
      .mean = static_cast<float*>(mean.mutable_data_ptr()),
      .rstd = static_cast<float*>(rstd.mutable_data_ptr()),
      .rows = product(leading),
      .width = width,
      .eps = static_cast<float>(eps),
      .dtype = dtype,
      .weight_dtype = weight_dtype,
  };
  launch<cpu::swiglu_forward, cuda::swiglu_forward>("swiglu_forward", gate, params);
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_backward(const Tensor& dout_any, const Tensor& gate,
                                                           const Tensor& up, std::optional<Tensor> weight_any,
                                                           const Tensor& mean_any, const Tensor& rstd_any,
                                                           bool has_bias) {
  require_pair(gate, up);
  require_same_shape(dout_any, gate, "dout and gate");
  const DType dtype = dtype_of(gate, "gate");
  require(dtype_of(dout_any, "dout") == dtype, "dout must be of gate's dtype");
  const int64_t rows = product(leading_sizes(gate));
  const int64_t width = gate.size(-1);
  const Tensor dout = torch::stable::contiguous(dout_any);
  const Tensor mean = torch::stable::contiguous(mean_any);
  const Tensor rstd = torch::stable::contiguous(rstd_any);
  const auto weight = contiguous_vector(weight_any, width, dtype, "norm_weight");
  const int64_t statistics = weight ? rows : 0;
  require(mean.scalar_type() == ScalarType::Float && rstd.scalar_type() == ScalarType::Float &&
              mean.numel() == statistics && rstd.numel() == statistics,
          "mean and rstd must be float32 with one element for each of the " + std::to_string(statistics) +
              " normalised rows");

  const RowsOf gate_rows(gate), up_rows(up);
  const Tensor dgate = torch::stable::new_empty(gate, gate.sizes());
  const Tensor dup = torch::stable::new_empty(gate, gate.sizes());
  const Tensor dweight = torch::stable::new_empty(weight ? *weight : mean, {weight ? width : 0});
  const Tensor dbias = torch::stable::new_empty(weight ? *weight : mean, {weight && has_bias ? width : 0});
  const SwigluBackward params = {
      .dout = dout.const_data_ptr(),
      .gate = gate_rows.rows(),
      .up = up_rows.rows(),
      .norm_weight = data_or_null(weight),
      .mean = static_cast<const float*>(mean.const_data_ptr()),
      .rstd = static_cast<const float*>(rstd.const_data_ptr()),
      .dgate = dgate.mutable_data_ptr(),
      .dup = dup.mutable_data_ptr(),
      .dweight = weight ? dweight.mutable_data_ptr() : nullptr,
      .dbias = weight && has_bias ? dbias.mutable_data_ptr() : nullptr,
      .rows = rows,
      .width = width,
      .dtype = dtype,
      .weight_dtype = weight ? dtype_of(*weight, "norm_weight") : dtype,
  };
  launch<cpu::swiglu_backward, cuda::swiglu_backward, cuda::swiglu_backward_workspace>("swiglu_backward",
                                                                                       gate, params);
  return {dgate, dup, dweight, dbias};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("swiglu_forward", TORCH_BOX(&evakernels::swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&evakernels::swiglu_backward));
})
