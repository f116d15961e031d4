// What the bindings of rope_attention for CPUs and for GPUs share.
#pragma once

#include "bind/torch_arguments.h"
#include "common/rope_attention.h"

namespace evakernels {

inline HeadsView view_of(const Tensor& heads) {
  return {const_cast<void*>(heads.const_data_ptr()), heads.stride(0), heads.stride(1), heads.stride(2)};
}

// With dense vectors; else a dense copy.
inline Tensor with_dense_vectors(const Tensor& heads) {
  return heads.stride(3) == 1 ? heads : as_contiguous(heads);
}

inline void require_tables(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  require(cos.has_value() == sin.has_value(), "cos and sin must be given both or neither");
  if (!cos) return;
  require_same_shape(*cos, *sin, "cos and sin");
  require(cos->dim() == 2 || cos->dim() == 3, "cos must be [P, D/2], [H, P, D/2] or [2, G, D/4]");
}

inline void require_heads(const Tensor& q, const Tensor& k, const Tensor& v) {
  require(q.dim() == 4, "q must be [B, N, H, D]");
  require_same_shape(q, k, "q and k");
  require_same_shape(q, v, "q and v");
  const DType dtype = dtype_of(q, "q");
  require(dtype_of(k, "k") == dtype && dtype_of(v, "v") == dtype, "k and v must be of q's dtype");
}

inline void require_results(const Tensor& q, const Tensor& dout, const Tensor& out, const Tensor& lse) {
  require_same_shape(q, dout, "q and dout");
  require_same_shape(q, out, "q and out");
  const DType dtype = dtype_of(q, "q");
  require(dtype_of(dout, "dout") == dtype && dtype_of(out, "out") == dtype,
          "dout and out must be of q's dtype");
  require(lse.scalar_type() == ScalarType::Float && lse.numel() == q.size(0) * q.size(1) * q.size(2),
          "lse must be float32 [B, H, N]");
}

}  // namespace evakernels
