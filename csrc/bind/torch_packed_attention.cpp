// packed_attention as torch operators. Its kernels are those of rope_attention, whose samples are sequences
// here.
#include "bind/attention_arguments.h"
#include "bind/launch.h"
#include "cpu/rope_attention.h"
#include "cuda/rope_attention.h"

namespace evakernels {
namespace {

// Arguments that forward and backward have in common, beside the tensors of heads.
struct Options {
  const Tensor& cu_seqlens;
  int64_t max_seqlen;
  bool causal;
  double scale;
};

AttentionShape packed_shape_of(const Tensor& q, const Tensor& k, const Options& options) {
  const Tensor& offsets = options.cu_seqlens;
  const int64_t tokens = q.size(0), longest = std::min(options.max_seqlen, tokens);
  require(tokens == 0 || longest > 0, "max_seqlen is 0, but there are tokens");
  require(offsets.dim() == 1 && offsets.size(0) > 0, "cu_seqlens must be [B + 1]");
  const ScalarType type = offsets.scalar_type();
  require(type == ScalarType::Int || type == ScalarType::Long, "cu_seqlens must be int32 or int64");
  const AttentionShape shape = {
      .batch = offsets.size(0) - 1,
      .tokens = longest,
      .keys = longest,
      .heads = q.size(1),
      .kv_heads = k.size(1),
      .head_dim = q.size(2),
      .num_prefix = 0,
      .scale = static_cast<float>(options.scale),
      .causal = options.causal,
      .dtype = dtype_of(q, "q"),
      .offsets = {offsets.const_data_ptr(), type == ScalarType::Long, tokens},
  };
  const cuda::Error reason = kCudaIsInterpreted || q.is_cuda() ? cuda::unserved(shape) : nullptr;
  if (reason) require(false, reason);
  return shape;
}

void require_packed(const Tensor& q, const Tensor& k, const Tensor& v) {
  require(q.dim() == 3, "q must be [T, H, D]");
  require_vectors(q, k, v);
}

std::tuple<Tensor, Tensor> packed_attention_forward(const Tensor& q_any, const Tensor& k_any,
                                                    const Tensor& v_any, const Tensor& cu_seqlens_any,
                                                    std::optional<Tensor> cos, std::optional<Tensor> sin,
                                                    std::optional<Tensor> token_index, int64_t max_seqlen,
                                                    bool causal, bool interleaved, double scale) {
  require_packed(q_any, k_any, v_any);
  const Tensor q = with_dense_vectors(q_any), k = with_dense_vectors(k_any), v = with_dense_vectors(v_any);
  const Tensor cu_seqlens = as_contiguous(cu_seqlens_any);
  const Tables tables(cos, sin, token_index, q, k, interleaved);
  const Tensor out = new_tensor(q, q.sizes());
  const Tensor lse = new_float32(q, {q.size(1), q.size(0)});
  const RopeAttentionForward params = {
      .q = view_of(q),
      .k = view_of(k),
      .v = view_of(v),
      .out = out.mutable_data_ptr(),
      .lse = static_cast<float*>(lse.mutable_data_ptr()),
      .tables = tables.tables(),
      .shape = packed_shape_of(q, k, {cu_seqlens, max_seqlen, causal, scale}),
  };
  launch<cpu::rope_attention_forward, cuda::rope_attention_forward>("packed_attention_forward", q, params);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(
    const Tensor& dout_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    const Tensor& out_any, const Tensor& lse_any, const Tensor& cu_seqlens_any, std::optional<Tensor> cos,
    std::optional<Tensor> sin, std::optional<Tensor> token_index, int64_t max_seqlen, bool causal,
    bool interleaved, double scale) {
  require_packed(q_any, k_any, v_any);
  require_results(q_any, dout_any, out_any, lse_any);
  const Tensor q = with_dense_vectors(q_any), k = with_dense_vectors(k_any), v = with_dense_vectors(v_any);
  const Tensor dout = with_dense_vectors(dout_any), out = with_dense_vectors(out_any);
  const Tensor lse = as_contiguous(lse_any), cu_seqlens = as_contiguous(cu_seqlens_any);
  const Tables tables(cos, sin, token_index, q, k, interleaved);
  const Tensor dq = new_tensor(q, q.sizes()), dk = new_tensor(q, q.sizes()), dv = new_tensor(q, q.sizes());
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
      .shape = packed_shape_of(q, k, {cu_seqlens, max_seqlen, causal, scale}),
  };
  launch<cpu::rope_attention_backward, cuda::rope_attention_backward>("packed_attention_backward", q, params);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("packed_attention_forward", TORCH_BOX(&evakernels::packed_attention_forward));
  m.impl("packed_attention_backward", TORCH_BOX(&evakernels::packed_attention_backward));
})
