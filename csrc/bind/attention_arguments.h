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

inline void require_vectors(const Tensor& q, const Tensor& k, const Tensor& v) {
  require_same_shape(k, v, "k and v");
  require(k.dim() == q.dim() && k.size(0) == q.size(0) && k.size(-1) == q.size(-1),
          "k must have as many samples and channels as q");
  const int64_t heads = q.size(-2), kv_heads = k.size(-2);
  require(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, "q's heads must be a multiple of k's");
  const DType dtype = dtype_of(q, "q");
  require(dtype_of(k, "k") == dtype && dtype_of(v, "v") == dtype, "k and v must be of q's dtype");
}

inline void require_heads(const Tensor& q, const Tensor& k, const Tensor& v) {
  require(q.dim() == 4, "q must be [B, N, H, D]");
  require_vectors(q, k, v);
}

// Of q [B, N, H, D] and k [B, M, Hkv, D].
inline AttentionShape shape_of(const Tensor& q, const Tensor& k, int64_t num_prefix, bool causal,
                               double scale) {
  return {
      .batch = q.size(0),
      .tokens = q.size(1),
      .keys = k.size(1),
      .heads = q.size(2),
      .kv_heads = k.size(2),
      .head_dim = q.size(3),
      .num_prefix = num_prefix,
      .scale = static_cast<float>(scale),
      .causal = causal,
      .dtype = dtype_of(q, "q"),
      .offsets = {},
  };
}

// The sizes of the gradients of k and v, which are those of each query head.
inline std::vector<int64_t> sizes_of_gradients(const Tensor& q, const Tensor& k) {
  std::vector<int64_t> sizes(k.sizes().begin(), k.sizes().end());
  sizes[sizes.size() - 2] = q.size(-2);
  return sizes;
}

// cos and sin as the kernels read them: dense, in float32.
class Tables {
 public:
  // Of q [B, N, H, D] and k [B, M, Hkv, D], or of a packed batch of [T, H, D] and [T, Hkv, D].
  Tables(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
         const std::optional<Tensor>& token_index, const Tensor& q, const Tensor& k, bool interleaved)
      : interleaved_(interleaved) {
    require(cos.has_value() == sin.has_value(), "cos and sin must be given both or neither");
    if (!cos) return;
    require_same_shape(*cos, *sin, "cos and sin");
    require(cos->dim() == 2 || cos->dim() == 3, "cos must be [P, D/2], [H, P, D/2] or [2, G, D/4]");
    const int64_t head_dim = q.size(-1);
    is_compact_ = cos->dim() == 3 && cos->size(2) == head_dim / 4;
    require(is_compact_ ? cos->size(0) == 2 : cos->size(-1) == head_dim / 2,
            "cos must have an entry for each pair");
    require(k.size(-3) == q.size(-3), "keys are rotated only where there are as many as queries");
    const bool per_head = cos->dim() == 3 && !is_compact_;
    require(!per_head || k.size(-2) == q.size(-2), "tables of each head need as many heads of keys");
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
