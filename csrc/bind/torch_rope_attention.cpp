// rope_attention as torch operators.
#include "bind/attention_arguments.h"
#include "bind/launch.h"
#include "cpu/rope_attention.h"
#include "cuda/rope_attention.h"

namespace evakernels {
namespace {

// Raises what the kernels for GPUs don't serve.
AttentionShape served(const Tensor& q, const AttentionShape& shape) {
  const cuda::Error reason = kCudaIsInterpreted || q.is_cuda() ? cuda::unserved(shape) : nullptr;
  if (reason) require(false, reason);
  return shape;
}

std::tuple<Tensor, Tensor> rope_attention_forward(const Tensor& q_any, const Tensor& k_any,
                                                  const Tensor& v_any, std::optional<Tensor> cos,
                                                  std::optional<Tensor> sin,
                                                  std::optional<Tensor> token_index, int64_t num_prefix,
                                                  bool causal, bool interleaved, double scale) {
  require_heads(q_any, k_any, v_any);
  const Tensor q = with_dense_vectors(q_any), k = with_dense_vectors(k_any), v = with_dense_vectors(v_any);
  const Tables tables(cos, sin, token_index, q, k, interleaved);
  const Tensor out = new_tensor(q, q.sizes());
  const Tensor lse = new_float32(q, {q.size(0), q.size(2), q.size(1)});
  const RopeAttentionForward params = {
      .q = view_of(q),
      .k = view_of(k),
      .v = view_of(v),
      .out = out.mutable_data_ptr(),
      .lse = static_cast<float*>(lse.mutable_data_ptr()),
      .tables = tables.tables(),
      .shape = served(q, shape_of(q, k, num_prefix, causal, scale)),
  };
  launch<cpu::rope_attention_forward, cuda::rope_attention_forward>("rope_attention_forward", q, params);
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
  const Tables tables(cos, sin, token_index, q, k, interleaved);
  const Tensor dq = new_tensor(q, q.sizes());
  const Tensor dk = new_tensor(q, sizes_of_gradients(q, k));
  const Tensor dv = new_tensor(q, sizes_of_gradients(q, k));
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
      .shape = served(q, shape_of(q, k, num_prefix, causal, scale)),
  };
  launch<cpu::rope_attention_backward, cuda::rope_attention_backward>("rope_attention_backward", q, params);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("rope_attention_forward", TORCH_BOX(&evakernels::rope_attention_forward));
  m.impl("rope_attention_backward", TORCH_BOX(&evakernels::rope_attention_backward));
})
