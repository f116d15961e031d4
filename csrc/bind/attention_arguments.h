// What the bindings of rope_attention for CPUs and for GPUs share.
#pragma once

#include "bind/torch_arguments.h"
#include "common/rope_attention.h"

namespace evakernels {

// Of a [B, N, H, D], or a [T, H, D].
inline HeadsView view_of(const Tensor& heads) {
  return {.data = const_cast<void*>(heads.const_data_ptr()),
          .batch_stride = heads.dim() == 4 ? heads.stride(0) : 0,
          .token_stride = heads.stride(-3),
          .head_stride = heads.stride(-2)};
}

// With dense vectors; else a dense copy.
inline Tensor with_dense_vectors(const Tensor& heads) {
  return heads.stride(-1) == 1 ? heads : as_contiguous(heads);
}

inline void require_tables(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  require(cos.has_value() == sin.has_value(), "cos and sin must be given both or neither");
  if (!cos) return;
  require_same_shape(*cos, *sin, "cos and sin");
  require(cos->dim() == 2 || cos->dim() == 3, "cos must be [P, D/2], [H, P, D/2] or [2, G, D/4]");
}

// Whether a table is [2, G, D/4]: that of the rows and that of the columns of a grid.
inline bool is_compact(const Tensor& table, int64_t head_dim) {
  return table.dim() == 3 && table.size(2) == head_dim / 4;
}

inline void require_vectors(const Tensor& q, const Tensor& k, const Tensor& v) {
  require_same_shape(q, k, "q and k");
  require_same_shape(q, v, "q and v");
  const DType dtype = dtype_of(q, "q");
  require(dtype_of(k, "k") == dtype && dtype_of(v, "v") == dtype, "k and v must be of q's dtype");
}

inline void require_heads(const Tensor& q, const Tensor& k, const Tensor& v) {
  require(q.dim() == 4, "q must be [B, N, H, D]");
  require_vectors(q, k, v);
}

inline void require_results(const Tensor& q, const Tensor& dout, const Tensor& out, const Tensor& lse) {
  require_same_shape(q, dout, "q and dout");
  require_same_shape(q, out, "q and out");
  const DType dtype = dtype_of(q, "q");
  require(dtype_of(dout, "dout") == dtype && dtype_of(out, "out") == dtype,
          "dout and out must be of q's dtype");
  require(lse.scalar_type() == ScalarType::Float && lse.numel() * q.size(-1) == q.numel(),
          "lse must be float32 and have one number for each vector of q");
}

}  // namespace evakernels
