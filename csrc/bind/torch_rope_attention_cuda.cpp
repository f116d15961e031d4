// rope_attention as torch operators on a GPU: the kernels do it all.
#include "bind/attention_arguments.h"
#include "bind/launch.h"
#include "cuda/rope_attention.h"

namespace evakernels {
namespace {

AttentionShape shape_of(const Tensor& q, int64_t num_prefix, bool causal, double scale) {
  const AttentionShape shape = {
      .batch = q.size(0),
      .tokens = q.size(1),
      .heads = q.size(2),
      .head_dim = q.size(3),
      .num_prefix = num_prefix,
      .scale = static_cast<float>(scale),
      .causal = causal,
      .dtype = dtype_of(q, "q"),
      .offsets = {},
  };
  const cuda::Error reason = cuda::unserved(shape);
  if (reason) require(false, reason);
  return shape;
}

// cos and sin as the kernels read them: dense, in float32.
class Tables {
 public:
  Tables(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
         const std::optional<Tensor>& token_index, int64_t head_dim, bool interleaved)
      : interleaved_(interleaved) {
    require_tables(cos, sin);
    if (!cos) return;
    is_compact_ = is_compact(*cos, head_dim);
    require(is_compact_ ? cos->size(0) == 2 : cos->size(-1) == head_dim / 2,
            "cos must have an entry for each pair");
    cos_ = dense(*cos);
    sin_ = dense(*sin);
    if (token_index) token_index_ = as_contiguous(*token_index);
  }

  RotaryTables tables() const {
    if (!cos_) return {};
    const int64_t rows = cos_->size(-2);
    return {
        .cos = static_cast<const float*>(cos_->const_data_ptr()),
        .sin = static_cast<const float*>(sin_->const_data_ptr()),
        .token_index = static_cast<const int64_t*>(data_or_null(token_index_)),
        .rows = is_compact_ ? rows * rows : rows,
        .head_stride = cos_->dim() == 3 && !is_compact_ ? rows * cos_->size(2) : 0,
        .grid = is_compact_ ? rows : 0,
        .interleaved = interleaved_,
    };
  }

 private:
  static Tensor dense(const Tensor& table) {
    return as_contiguous(torch::stable::to(table, ScalarType::Float));
  }

  std::optional<Tensor> cos_, sin_, token_index_;
  bool is_compact_ = false;
  bool interleaved_;
};

std::tuple<Tensor, Tensor> rope_attention_forward(const Tensor& q_any, const Tensor& k_any,
                                                  const Tensor& v_any, std::optional<Tensor> cos,
                                                  std::optional<Tensor> sin,
                                                  std::optional<Tensor> token_index, int64_t num_prefix,
                                                  bool causal, bool interleaved, double scale) {
  require_heads(q_any, k_any, v_any);
  const Tensor q = with_dense_vectors(q_any), k = with_dense_vectors(k_any), v = with_dense_vectors(v_any);
  const Tables tables(cos, sin, token_index, q.size(3), interleaved);
  const Tensor out = new_tensor(q, q.sizes());
  const Tensor lse = new_float32(q, {q.size(0), q.size(2), q.size(1)});
  const RopeAttentionForward params = {
      .q = view_of(q),
      .k = view_of(k),
      .v = view_of(v),
      .out = out.mutable_data_ptr(),
      .lse = static_cast<float*>(lse.mutable_data_ptr()),
      .tables = tables.tables(),
      .shape = shape_of(q, num_prefix, causal, scale),
  };
  launch_on_gpu<cuda::rope_attention_forward>("rope_attention_forward", q, params);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> rope_attention_backward(
    const Tensor& dout_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    const Tensor& out_any, const Tensor& lse_any, std::optional<Tensor> cos, std::optional<Tensor> sin,
    std::optional<Tensor> token_index, int64_t num_prefix, bool causal, bool interleaved, double scale) {
  require_heads(q_any, k_any, v_any);
  require_results(q_any, dout_any, out_any, lse_any);
  const Tensor q = with_dense_vectors(q_any), k = with_dense_vectors(k_any), v = with_dense_vectors(v_any);
  const Tensor dout = with_dense_vectors(dout_any), out = with_dense_vectors(out_any);
  const Tensor lse = as_contiguous(lse_any);
  const Tables tables(cos, sin, token_index, q.size(3), interleaved);
  const Tensor dq = new_tensor(q, q.sizes());
  const Tensor dk = new_tensor(q, q.sizes());
  const Tensor dv = new_tensor(q, q.sizes());
  const RopeAttentionBackward params = {
      .dout = view_of(dout),
      .q = view_of(q),
      .k = view_of(k),
      .v = view_of(v),
      .out = view_of(out),
      .lse = static_cast<const float*>(lse.const_data_ptr()),
      .dq = dq.mutable_data_ptr(),
      .dk = dk.mutable_data_ptr(),
      .dv = dv.mutable_data_ptr(),
      .tables = tables.tables(),
      .shape = shape_of(q, num_prefix, causal, scale),
  };
  launch_on_gpu<cuda::rope_attention_backward, cuda::rope_attention_backward_workspace>(
      "rope_attention_backward", q, params);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT_ON_GPU(m, {
  m.impl("rope_attention_forward", TORCH_BOX(&evakernels::rope_attention_forward));
  m.impl("rope_attention_backward", TORCH_BOX(&evakernels::rope_attention_backward));
})
