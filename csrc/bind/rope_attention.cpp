// Attention with rotary embedding, of samples and of packed sequences.
#include "include/rope_attention.h"

#include <algorithm>

#include "bind/binding.h"

namespace evakernels {
namespace {

struct AttentionOptions {
  OptionalInput cos, sin, token_index;
  Array offsets;  // cu_seqlens of a packed batch
  int64_t num_prefix, max_seqlen;
  bool causal, interleaved;
  double scale;
};

// Dense vectors, and tokens no further apart than the GPU kernels address. Strides of empty tensors and of
// dimensions of size 1 have no meaning.
bool are_readable_heads(Sizes sizes, Sizes strides) {
  const size_t axes = sizes.size();
  require(axes == 3 || axes == 4, "q, k and v must be [B, N, H, D] or [T, H, D]");
  const bool is_near = sizes[axes - 3] == 1 || strides[axes - 3] <= cuda::kMaxHeadElements;
  return product(sizes) == 0 || (is_near && (strides.back() == 1 || sizes.back() == 1));
}

Array read_heads(Call& call, Input heads, const char* name) {
  return call.read_readable(heads, name, are_readable_heads);
}

HeadsView view_of(const Array& heads) {
  require(are_readable_heads(heads.sizes, heads.strides), heads.name, " must have dense vectors");
  const size_t axes = heads.sizes.size();
  return {.data = heads.data,
          .batch_stride = axes == 4 ? heads.strides[0] : 0,
          .token_stride = heads.strides[axes - 3],
          .head_stride = heads.strides[axes - 2]};
}

HeadsView view_like(const Array& heads, const Array& q) {
  require_like(heads, q);
  return view_of(heads);
}

// q, k and v, with shape and tables of the call.
struct AttentionInputs {
  Array q, k, v;
  AttentionShape shape;
  RotaryTables tables;

  AttentionInputs(Call& call, Input q_in, Input k_in, Input v_in, const AttentionOptions& options)
      : q(read_heads(call, q_in, "q")), k(read_heads(call, k_in, "k")), v(read_heads(call, v_in, "v")) {
    view_of(q);
    require_like(v, k);
    require_dtype(k, q.dtype);
    const size_t axes = q.sizes.size();
    require(k.sizes.size() == axes && k.sizes[0] == q.sizes[0] && k.sizes.back() == q.sizes.back(),
            "k must have as many samples and channels as q");
    const int64_t heads = q.sizes[axes - 2], kv_heads = k.sizes[axes - 2];
    require(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, "q's heads must be a multiple of k's");
    set_shape(options);
    set_tables(call, options);
  }

  // Checks that the CUDA kernels support the call.
  void require_served(const Call& call) const {
    const cuda::Error reason = call.is_on_gpu() ? cuda::unserved(shape, tables) : nullptr;
    if (reason) require(false, reason);
  }

  // Sizes of lse: [B, H, N] or [H, T].
  std::vector<int64_t> lse_sizes() const {
    if (shape.offsets.data) return {shape.heads, shape.offsets.tokens};
    return {shape.batch, shape.heads, shape.tokens};
  }

  // Sizes of dk and dv, per query head.
  std::vector<int64_t> gradient_sizes() const {
    std::vector<int64_t> sizes(k.sizes.begin(), k.sizes.end());
    sizes[sizes.size() - 2] = shape.heads;
    return sizes;
  }

 private:
  void set_shape(const AttentionOptions& options) {
    const size_t axes = q.sizes.size();
    shape = {
        .batch = q.sizes[0],
        .tokens = q.sizes[axes - 3],
        .keys = k.sizes[axes - 3],
        .heads = q.sizes[axes - 2],
        .kv_heads = k.sizes[axes - 2],
        .head_dim = q.sizes[axes - 1],
        .num_prefix = options.num_prefix,
        .scale = static_cast<float>(options.scale),
        .causal = options.causal,
        .dtype = q.dtype,
        .offsets = {},
    };
    require(options.num_prefix >= 0 && options.num_prefix <= 16, "num_prefix must be from 0 to 16");
    const Array& offsets = options.offsets;
    require(bool(offsets) == (axes == 3), "cu_seqlens are for q [T, H, D], and needed there");
    if (!offsets) return;
    require(offsets.sizes.size() == 1 && offsets.sizes[0] > 0, "cu_seqlens must be [B + 1]");
    require(options.num_prefix == 0,
            "packed sequences have no num_prefix; a token_index of -1 stands for it");
    require(options.max_seqlen > 0 || shape.tokens == 0, "max_seqlen must be positive");
    shape.offsets = {offsets.data, !offsets.is_int32, shape.tokens};
    shape.batch = offsets.sizes[0] - 1;
    shape.tokens = shape.keys = std::min(options.max_seqlen, shape.tokens);
  }

  void set_tables(Call& call, const AttentionOptions& options) {
    const Array cos = call.read_float32_optional(options.cos, "cos"),
                sin = call.read_float32_optional(options.sin, "sin"),
                index = call.read_index(options.token_index, "token_index");
    require(bool(cos) == bool(sin), "cos and sin must be given both or neither");
    tables = {};
    if (!cos) return;
    require(shape.num_prefix <= shape.tokens, "num_prefix must be no more than there are tokens");
    require(shape.keys == shape.tokens, "keys are rotated only where there are as many as queries");
    require_like(sin, cos);
    const size_t axes = cos.sizes.size();
    require(
        (axes == 2 || (axes == 3 && cos.sizes[0] == shape.heads)) && cos.sizes.back() == shape.head_dim / 2,
        "cos must be [P, D/2] or [H, P, D/2]");
    require(axes == 2 || shape.kv_heads == shape.heads, "tables of each head need as many heads of keys");
    const int64_t rows = cos.sizes[axes - 2];
    const int64_t patches = shape.tokens - shape.num_prefix;
    const bool packed = shape.offsets.data != nullptr;
    if (index) {
      packed ? require_sizes(index, {shape.offsets.tokens}) : require_sizes(index, {shape.batch, patches});
    } else {
      require(packed ? rows >= patches : rows == patches,
              "without a token_index cos must have a row for each patch");
    }
    tables = {.cos = cos.floats(),
              .sin = sin.floats(),
              .token_index = static_cast<const int64_t*>(index.data),
              .rows = rows,
              .head_stride = axes == 3 ? rows * cos.sizes[2] : 0,
              .interleaved = options.interleaved};
  }
};

std::tuple<Tensor, Tensor> attend(const char* op, Call& call, Input q, Input k, Input v,
                                  const AttentionOptions& options) {
  const AttentionInputs in(call, q, k, v, options);
  const RopeAttentionForward params = {
      .q = view_of(in.q),
      .k = view_of(in.k),
      .v = view_of(in.v),
      .out = call.output("out", in.q.sizes, in.q.dtype).data,
      .lse = call.output("lse", in.lse_sizes(), DType::Float32).floats(),
      .tables = in.tables,
      .shape = in.shape,
  };
  in.require_served(call);
  call.launch<cpu::rope_attention_forward, cuda::rope_attention_forward>(op, params);
  return call.results<2>();
}

std::tuple<Tensor, Tensor, Tensor> attend_backward(const char* op, Call& call, Input dout, Input q, Input k,
                                                   Input v, Input out, Input lse_in,
                                                   const AttentionOptions& options) {
  const AttentionInputs in(call, q, k, v, options);
  const Array lse = call.read(lse_in, "lse");
  require_dtype(lse, DType::Float32);
  require_sizes(lse, in.lse_sizes());
  const RopeAttentionBackward params = {
      .dout = view_like(read_heads(call, dout, "dout"), in.q),
      .q = view_of(in.q),
      .k = view_of(in.k),
      .v = view_of(in.v),
      .out = view_like(read_heads(call, out, "out"), in.q),
      .lse = lse.floats(),
      .dq = call.output("dq", in.q.sizes, in.q.dtype).data,
      .dk = call.output("dk", in.gradient_sizes(), in.q.dtype).data,
      .dv = call.output("dv", in.gradient_sizes(), in.q.dtype).data,
      .tables = in.tables,
      .shape = in.shape,
  };
  in.require_served(call);
  call.launch<cpu::rope_attention_backward, cuda::rope_attention_backward>(op, params);
  return call.results<3>();
}

std::tuple<Tensor, Tensor> rope_attention_forward(Input q, Input k, Input v, OptionalInput cos,
                                                  OptionalInput sin, OptionalInput token_index,
                                                  int64_t num_prefix, bool causal, bool interleaved,
                                                  double scale) {
  Call call;
  return attend("rope_attention_forward", call, q, k, v,
                {cos, sin, token_index, no_array("cu_seqlens"), num_prefix, 0, causal, interleaved, scale});
}

std::tuple<Tensor, Tensor, Tensor> rope_attention_backward(Input dout, Input q, Input k, Input v, Input out,
                                                           Input lse, OptionalInput cos, OptionalInput sin,
                                                           OptionalInput token_index, int64_t num_prefix,
                                                           bool causal, bool interleaved, double scale) {
  Call call;
  return attend_backward(
      "rope_attention_backward", call, dout, q, k, v, out, lse,
      {cos, sin, token_index, no_array("cu_seqlens"), num_prefix, 0, causal, interleaved, scale});
}

std::tuple<Tensor, Tensor> packed_attention_forward(Input q, Input k, Input v, Input cu_seqlens,
                                                    OptionalInput cos, OptionalInput sin,
                                                    OptionalInput token_index, int64_t max_seqlen,
                                                    bool causal, bool interleaved, double scale) {
  Call call;
  return attend("packed_attention_forward", call, q, k, v,
                {cos, sin, token_index, call.read_index(cu_seqlens, "cu_seqlens", true), 0, max_seqlen,
                 causal, interleaved, scale});
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(Input dout, Input q, Input k, Input v, Input out,
                                                             Input lse, Input cu_seqlens, OptionalInput cos,
                                                             OptionalInput sin, OptionalInput token_index,
                                                             int64_t max_seqlen, bool causal,
                                                             bool interleaved, double scale) {
  Call call;
  return attend_backward("packed_attention_backward", call, dout, q, k, v, out, lse,
                         {cos, sin, token_index, call.read_index(cu_seqlens, "cu_seqlens", true), 0,
                          max_seqlen, causal, interleaved, scale});
}

}  // namespace

EVAKERNELS_OPS(rope_attention, m) {
  EVAKERNELS_OP(m, rope_attention_forward);
  EVAKERNELS_OP(m, rope_attention_backward);
  EVAKERNELS_OP(m, packed_attention_forward);
  EVAKERNELS_OP(m, packed_attention_backward);
}

}  // namespace evakernels
